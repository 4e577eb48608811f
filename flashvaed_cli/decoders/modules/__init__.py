"""The networks: operators, norms, blocks, and the coder that a spec becomes."""
