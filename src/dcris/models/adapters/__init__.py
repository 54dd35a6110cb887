"""Methods of tuning, one a file."""
