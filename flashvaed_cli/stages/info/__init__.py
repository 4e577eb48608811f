"""`flashvaed info`: what a file is, where it came from, what was measured of it, and what to do next."""
