"""Checkpoints of other programs: recognise, read and write them, whatever widths and operators they have."""
