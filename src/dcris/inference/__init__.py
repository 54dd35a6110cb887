"""Segmenting images, folders and videos."""
