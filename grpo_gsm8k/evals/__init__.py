"""Accuracy, and what may be said of it."""
