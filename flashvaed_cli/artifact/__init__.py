"""Read, write, recognise and translate checkpoints."""
