"""One file per export target, each with its parity check."""
