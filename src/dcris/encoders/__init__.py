"""The two frozen towers, and how their weights are read."""
