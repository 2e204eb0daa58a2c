"""Accuracy, with intervals, tests and studies."""
