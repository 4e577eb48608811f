"""Checkpoints of other programs: recognise, read and write them, at any widths and with any operators."""
