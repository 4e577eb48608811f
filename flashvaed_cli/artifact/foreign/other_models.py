"""Recognise checkpoints of other kinds by names and shapes, to report what was given by mistake."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from flashvaed_cli.artifact.foreign.mismatch import Shape

Shapes = Mapping[str, Shape]


def looks_like(shapes: Shapes) -> str | None:
    """What a checkpoint of another kind is, in words; None if it is not recognised."""
    for what, fits in _OTHERS:
        if fits(shapes):
            return what
    return None


def _has(pattern: str, *, num_axes: int | None = None) -> Callable[[Shapes], bool]:
    """Tests whether the name of a tensor with so many axes matches."""
    compiled = re.compile(pattern)
    return lambda shapes: any(
        compiled.search(name) and num_axes in (None, len(shape)) for name, shape in shapes.items()
    )


def _lacks(pattern: str) -> Callable[[Shapes], bool]:
    """Tests whether no name matches."""
    found = _has(pattern)
    return lambda shapes: not found(shapes)


def _all_of(*tests: Callable[[Shapes], bool]) -> Callable[[Shapes], bool]:
    return lambda shapes: all(test(shapes) for test in tests)


_LACKS_GAINS = _lacks(r"^decoder\.mid\.block_1\.norm1\.gamma$")  # unlike HunyuanVideo 1.5, which is read

# First fit wins.
_OTHERS: tuple[tuple[str, Callable[[Shapes], bool]], ...] = (
    ("an adapter (LoRA), not a VAE", _has(r"\.lora_(A|B|up|down)\b|lora_unet")),
    ("a CogVideoX VAE", _has(r"^decoder\..*norm1\.conv_y\.")),
    ("LTX-2's VAE for sound", _all_of(_has(r"^decoder\.mid\.block_1\.conv1\.conv\.weight$", num_axes=4), _LACKS_GAINS)),
    (
        "a HunyuanVideo VAE, but without the names of Tencent's or diffusers' files",
        _all_of(_has(r"^decoder\.mid\.block_1\.conv1\.conv\.weight$", num_axes=5), _LACKS_GAINS),
    ),
    (
        "a VAE for images with fewer resolutions than Stable Diffusion's",
        _all_of(
            _has(r"^decoder\.mid(_block\.resnets\.0|\.block_1)\.norm1\.weight$"),
            _has(r"^decoder\.conv_in\.weight$", num_axes=4),
            _lacks(r"^decoder\.up(_blocks)?\.3\."),
        ),
    ),
    ("a tiny autoencoder (TAEHV, LightTAE)", _all_of(_has(r"^decoder\.\d+\."), _has(r"^encoder\.\d+\."))),
    ("a diffusion transformer, not a VAE", _has(r"(^|\.)(transformer_)?blocks\.\d+\.(self_attn|attn1|cross_attn)\.")),
    ("a diffusion model, not a VAE", _has(r"^model\.diffusion_model\.|^(down|mid)_blocks?\..*attn2")),
)
