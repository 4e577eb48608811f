"""Solve the layers of each kind of block, and of a bypass: the original beside the new decoder."""
