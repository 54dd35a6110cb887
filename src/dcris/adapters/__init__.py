"""What is trained inside the frozen towers, one method a file."""
