"""flashvaed: turn the decoder of a video VAE into a fast drop-in decoder for the same latents."""

__version__ = "0.3.0"
