"""Weights as whole numbers with scales: what schemes there are, and the rounding, in NumPy."""
