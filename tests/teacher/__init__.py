"""How `builtin:tiny-wan`, the embedded VAE, was trained: `make teacher` does it anew. No part of the package."""
