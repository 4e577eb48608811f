"""The embedded default: builtin:tiny-wan and the procedural demo clip."""
