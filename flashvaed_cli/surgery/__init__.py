"""Choose channels, swap operators, reconstruct weights: decoder in, decoder out."""
