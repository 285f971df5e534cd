"""What leaves a run: pipeline, model card, report."""
