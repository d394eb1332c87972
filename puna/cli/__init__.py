"""The command line: one module a verb. No module here imports Keras before a model is to run."""
