"""Data sets: rows, chat templates, and batches of model inputs."""
