"""The decoder as safetensors in a layout that others read; the file is read back before it appears."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from flashvaed_cli.atomic import atomic_path
from flashvaed_cli.decoders.coder import Decoder
from flashvaed_cli.decoders.streaming import decode
from flashvaed_cli.errors import ExportError
from flashvaed_cli.export.parity import relative_difference, require_parity
from flashvaed_cli.export.result import ExportResult

# float32: equal weights through equal code, but another memory format may choose another kernel.
# The halves: weights rounded to 11 and 8 bits, over some forty layers.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@torch.no_grad()
def export_safetensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str],
    *,
    reload: Callable[[Path], Decoder],
    decoder: Decoder,
    latents: Float[Tensor, "B C Tz Hz Wz"],
    notes: tuple[str, ...] = (),
) -> ExportResult:
    """Write tensors, read them back as a decoder and compare its frames.

    Args:
        tensors: in the target's names and shapes, one floating dtype.
        metadata: the header of the file.
        reload: reads the target's layout from a path.
        decoder: what the file must reproduce.
        latents: raw, for the comparison.
        notes: passed on to the result (where the file fits).
    Raises:
        ExportError: mixed or unknown dtypes, or the file read back decodes differently.
    """
    tolerance = TOLERANCES[_dtype_of(tensors)]
    with atomic_path(path) as draft:
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(own, draft, metadata=dict(metadata))
        reloaded = decode(_at_float32(reload(draft)), latents.float().cpu())
        difference = relative_difference(reloaded, decode(_at_float32(decoder), latents.float().cpu()))
        require_parity(difference, tolerance, where=f"{path.name}, read back,")
        size_bytes = draft.stat().st_size
    return ExportResult(
        target="safetensors",
        paths=(path,),
        size_bytes=size_bytes,
        max_abs_difference=difference,
        tolerance=tolerance,
        notes=notes,
    )


def _dtype_of(tensors: Mapping[str, Tensor]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= TOLERANCES.keys():
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)) or "no tensor at all"
        raise ExportError(f"a checkpoint holds tensors of one of float32, float16 and bfloat16, got {found}")
    return dtypes.pop()


def _at_float32(decoder: Decoder) -> Decoder:
    reference = Decoder(decoder.spec).eval()
    reference.load_state_dict(decoder.state_dict())
    return reference
