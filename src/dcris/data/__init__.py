"""Data sets: references, images, masks and expressions, up to the tensors for the network."""
