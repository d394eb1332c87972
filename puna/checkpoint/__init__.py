"""Reading and writing checkpoints: what the files hold, in Hugging Face's tensor names."""
