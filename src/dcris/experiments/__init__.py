"""Quickstart, ablations, benchmarks."""
