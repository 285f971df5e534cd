"""Train and fine-tune Stable-Diffusion-class text-to-image models."""

__version__ = "0.1.0"
