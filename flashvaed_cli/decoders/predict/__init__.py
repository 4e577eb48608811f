"""Predictions from a spec alone: cost, memory, latency, tiles, lookahead. Imports no torch."""
