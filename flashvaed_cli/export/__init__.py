"""One file per target, each with its parity check."""
