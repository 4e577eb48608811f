"""Encoders and decoders: specs, predictions from them, networks, variants, and how they run."""
