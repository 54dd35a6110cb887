"""Training: the trainer, losses, loggers, several processes."""
