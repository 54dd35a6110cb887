"""Weights files: reading, writing, converting, finding."""
