"""Helpers that know nothing of models and data: files, devices, processes, drawing."""
