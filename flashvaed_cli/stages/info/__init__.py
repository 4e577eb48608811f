"""`flashvaed info`: what a file is, where it came from, what was measured on it, and what to do next."""
