"""Layers that towers, adapters and head share."""
