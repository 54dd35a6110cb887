"""The segmentation head, and the whole network."""
