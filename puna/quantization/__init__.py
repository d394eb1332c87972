"""Weights as small numbers with scales: what schemes there are, and the rounding, in NumPy."""
