"""The embedded default: builtin:tiny-wan and the clips that ship with it."""
