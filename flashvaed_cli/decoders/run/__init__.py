"""Decoding clips: chunks with a causal state, tiles, limits of memory, faults named by layer."""
