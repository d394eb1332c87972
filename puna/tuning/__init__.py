"""Training: texts to batches."""
