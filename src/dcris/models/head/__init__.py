"""The segmentation head (section 3.4)."""
