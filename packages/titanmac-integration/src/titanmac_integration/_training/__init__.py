"""Training: the loop, its settings, its checkpoints and its records."""
