"""Decode clips: chunks with a causal state, tiles, memory limits, overflows traced to their layer."""
