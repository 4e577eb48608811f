"""What the user probably meant by a flag that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

# Other programs' words for a flag, mapped to this program's; the first that the command has is suggested.
_SYNONYMS: dict[str, tuple[str, ...]] = {
    "--clips": ("--data",),
    "--clip": ("--data",),
    "--video": ("--data",),
    "--videos": ("--data",),
    "--dataset": ("--data",),
    "--images": ("--data",),
    "--keep": ("--ratio",),
    "--keep-ratio": ("--ratio",),
    "--sparsity": ("--ratio",),
    "--steps": ("--num-steps",),
    "--max-steps": ("--num-steps",),
    "--iterations": ("--num-steps",),
    "--lr": ("--learning-rate",),
    "--batch": ("--batch-size",),
    "--bs": ("--batch-size",),
    "--frames": ("--num-frames",),
    "--num-clips": ("--num-calibration-clips",),
    "--out": ("--output",),
    "--output-dir": ("--output",),
    "--outdir": ("--output",),
    "--format": ("--target",),
    "--precision": ("--dtype",),
    "--fp16": ("--dtype",),
    "--bf16": ("--dtype",),
    "--half": ("--dtype",),
    "--gpu": ("--device",),
    "--cuda": ("--device",),
    "--cpu": ("--device",),
    "--teacher": ("--original",),
    "--vae": ("--original", "--decoder"),
    "--latents": ("--data",),
    "--config": ("--recipe",),
    "--yaml": ("--recipe",),
    "--overwrite": ("--force",),
    "--yes": ("--force",),
    "--silent": ("--quiet",),
    "--resolution": ("--max-side", "--sizes"),
    "--size": ("--max-side", "--sizes"),
    "--threshold": ("--require",),
    "--ops": ("--operator",),
    "--operators": ("--operator",),
}


def suggestions(flag: str, known: Sequence[str]) -> list[str]:
    """Flags of a command that a word may stand for: what it means elsewhere, or else flags with similar spelling."""
    meant = [name for name in _SYNONYMS.get(flag, ()) if name in known]
    long = [name for name in known if name.startswith("--")]
    return meant[:1] or difflib.get_close_matches(flag, long, n=2, cutoff=0.75)
