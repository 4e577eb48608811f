"""What a spec tells before anything runs: cost, memory, latency, tiles, lookahead. Imports no torch."""
