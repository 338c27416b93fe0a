"""Metrics and streaming prediction; needs NumPy, not torch."""
