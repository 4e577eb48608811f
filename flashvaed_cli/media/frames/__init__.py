"""Decoded frames: out of containers and animated images, with their colours as an SDR screen shows them."""
