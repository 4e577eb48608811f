"""Decoders rewritten: exact operators, single images, low-rank layers as dense ones, scaling for float16."""
