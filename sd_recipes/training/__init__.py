"""What is trained, by what objective, and the loop."""
