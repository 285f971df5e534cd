"""What a run will need of memory, known before it begins."""
