"""The architecture as data: layers, coders, channel groups. Imports no torch."""
