"""Quality and speed of decoders."""
