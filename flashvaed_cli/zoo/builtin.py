"""What ships with the package: a small trained VAE and a clip that the program made itself."""

from __future__ import annotations

from pathlib import Path

_DATA = Path(__file__).parent / "data"

BUILTINS: dict[str, Path] = {"tiny-wan": _DATA / "tiny-wan.safetensors"}
"""Name behind `builtin:` to its artifact."""

DEMO_CLIP = _DATA / "demo.mp4"
"""Procedural clip, 33 frames of 256 x 256; made by `python -m flashvaed_cli.media.procedural`."""
