"""Tasks: what batches are made of, from generated problems, built-in prose and files."""
