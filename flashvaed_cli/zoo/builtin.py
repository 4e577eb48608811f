"""What ships with the package: a small trained VAE, clips to fit on and one to judge on."""

from __future__ import annotations

from pathlib import Path

_DATA = Path(__file__).parent / "data"

BUILTINS: dict[str, Path] = {"tiny-wan": _DATA / "tiny-wan.safetensors"}
"""Name after `builtin:` to its artifact."""

FITTING_CLIPS: tuple[Path, ...] = tuple(
    _DATA / "clips" / f"{name}.mp4" for name in ("bottles", "cockatoo", "mirror", "river", "sparks")
)
"""Clips to calibrate and train on without `--data`: 33 frames of 256 x 256 each."""

JUDGED_CLIP = _DATA / "clips" / "bird.mp4"
"""The clip that `eval` judges on without `--data`: 65 frames of 216 x 384, held out from all fitting."""
