"""The architecture: operators, specs, channel groups, streaming, families."""
