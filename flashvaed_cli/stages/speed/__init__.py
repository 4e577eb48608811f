"""`flashvaed eval --speed`: a table of how fast decoders are on this machine."""
