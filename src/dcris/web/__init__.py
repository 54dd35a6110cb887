"""The web page and its API: what `dcris web` serves."""
