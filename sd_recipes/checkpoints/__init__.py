"""A run's state on disk: its format, writing it in the background, resuming from it."""
