"""Frozen vision and text towers."""
