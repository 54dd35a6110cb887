"""Results in self-contained HTML files."""
