"""References, photographs, masks and words: everything that comes before the network."""
