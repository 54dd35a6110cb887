"""What `dcris predict` asks of many images and videos, and what it leaves on disk."""
