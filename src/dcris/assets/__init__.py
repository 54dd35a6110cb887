"""Files the package carries: the tiny towers' weights and vocabulary."""
