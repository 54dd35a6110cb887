"""Evaluation by exact protocols."""
