"""The parts of a pipeline and how they run: components, latents, conditioning, placement."""
