"""The decoder as safetensors in a layout that others read; every file is read back before it appears."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from flashvaed_cli import __version__
from flashvaed_cli.atomic import atomic_path
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.errors import ExportError
from flashvaed_cli.export.parity import copy_in, own_rounding, relative_difference, require_parity
from flashvaed_cli.export.result import ExportResult, Target

# float32: equal weights through equal code, but another memory format may select another kernel.
# Half precision: weights rounded to 11 and 8 bits, over some forty layers.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-2, torch.bfloat16: 5e-2}
READ_BACK = f"flashvaed {__version__}, torch {torch.__version__}"
CONFIG_NAME, WEIGHTS_NAME = "config.json", "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Reference:
    """What a file must reproduce: `decoder` on raw `latents`; `reload` reads the file's layout from a path."""

    decoder: Decoder
    latents: Float[Tensor, "B C Tz Hz Wz"]
    reload: Callable[[Path], Decoder]


@torch.no_grad()
def export_safetensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str],
    *,
    reference: Reference,
    target: Target = "safetensors",
    dtype: torch.dtype = torch.float32,
    exact: frozenset[str] = frozenset(),
    notes: tuple[str, ...] = (),
) -> ExportResult:
    """Write tensors, read them back as a decoder and compare its frames.

    Args:
        tensors: in the target's names and shapes.
        metadata: the header of the file.
        target: what the result calls it.
        dtype: of the weights in the file.
        exact: names that keep their dtype.
        notes: passed on to the result (where the file can be used).
    Raises:
        ExportError: an unknown dtype, weights that overflow in it, or the file decodes differently when read back.
    """
    with atomic_path(path) as draft:
        save_file(_written(tensors, dtype, exact), draft, metadata=dict(metadata))
        difference, allowed = read_back(reference, draft, dtype, path.name)
        size_bytes = draft.stat().st_size
    return ExportResult(target, (path,), size_bytes, difference, allowed, READ_BACK, notes=notes)


@torch.no_grad()
def export_diffusers(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, object],
    folder: Path,
    *,
    reference: Reference,
    dtype: torch.dtype = torch.float32,
    exact: frozenset[str] = frozenset(),
    beside: Mapping[str, str] | None = None,
    notes: tuple[str, ...] = (),
) -> ExportResult:
    """Write a folder as diffusers' `save_pretrained` does, read it back and compare. No folder is left on failure.

    Args:
        tensors: in diffusers' names and shapes.
        config: what the class takes, with `_class_name`.
        folder: a new one.
        beside: further text files, by name.
        dtype, exact, notes: as for `export_safetensors`.
    Raises:
        ExportError: as `export_safetensors`.
    """
    folder.mkdir()
    try:
        texts = {CONFIG_NAME: json.dumps(config, indent=2) + "\n", **(beside or {})}
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        whole = replace(reference, reload=lambda _: reference.reload(folder))
        weights = folder / WEIGHTS_NAME
        save_file(_written(tensors, dtype, exact), weights, metadata={"format": "pt"})
        difference, allowed = read_back(whole, weights, dtype, f"{folder.name}/")
    except BaseException:
        shutil.rmtree(folder)
        raise
    paths = (*(folder / name for name in texts), weights)
    size_bytes = sum(path.stat().st_size for path in paths)
    return ExportResult("diffusers", paths, size_bytes, difference, allowed, READ_BACK, notes=notes)


def _written(tensors: Mapping[str, Tensor], dtype: torch.dtype, exact: frozenset[str]) -> dict[str, Tensor]:
    """Separate copies, on the CPU, in the dtype of the file."""
    if dtype not in TOLERANCES:
        known = ", ".join(str(kind).removeprefix("torch.") for kind in TOLERANCES)
        raise ExportError(f"a checkpoint holds one of {known}, not {str(dtype).removeprefix('torch.')}")
    written: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        kind = tensor.dtype if name in exact else dtype
        written[name] = tensor.detach().to("cpu", kind, copy=True).contiguous()
        if not torch.isfinite(written[name]).all():
            raise ExportError(f"{name} overflows in {str(kind).removeprefix('torch.')}. Write another --dtype")
    return written


def read_back(reference: Reference, draft: Path, dtype: torch.dtype, name: str) -> tuple[float, float]:
    """How far the written file's frames differ, and what was allowed.

    Raises:
        ExportError: it is larger.
    """
    decoder, latents = copy_in(reference.decoder, torch.float32), reference.latents.float().cpu()
    reloaded = decode(copy_in(reference.reload(draft), torch.float32), latents)
    difference = relative_difference(reloaded, decode(decoder, latents))
    is_half = dtype != torch.float32
    allowed = require_parity(
        difference,
        TOLERANCES[dtype],
        where=f"{name}, read back,",
        rounding=None if is_half else lambda: own_rounding(decoder, latents),
        advice="The weights lose too much in this format: export --dtype float32" if is_half else "",
    )
    return difference, allowed
