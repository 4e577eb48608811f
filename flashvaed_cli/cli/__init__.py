"""Command line: one Typer file per command; parses, calls a stage, prints with rich."""
