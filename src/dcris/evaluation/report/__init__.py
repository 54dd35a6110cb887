"""Reports as HTML files and figures."""
