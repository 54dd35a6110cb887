"""One dataset layout a file; all give the same table of references."""
