"""The training loop, the evaluator, checkpoints."""
