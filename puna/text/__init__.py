"""Text in and out: tokenizers, chat templates and the preprocessor. No Keras, no TensorFlow."""
