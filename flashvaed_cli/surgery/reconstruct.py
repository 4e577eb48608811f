"""Closed-form reconstruction: solve each layer of a changed decoder against the original, in forward order.

Two decoders run side by side on the same clips. Inputs are what the *new* decoder really feeds a layer, so
each solve also makes up for the errors of the layers before it; targets are what the *original* computes
there, on the kept channels. Nothing is trained. The original runs once per block and clip, and only rows at
sampled positions are kept of it; what the blocks hand on lies on disk. So neither time nor memory depends on
more than the sums of one layer and the activations of one clip.

Reference: arXiv 2602.19161 trains these layers; this is a departure (METHOD, "closed-form reconstruction").
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.coder import Decoder
from flashvaed_cli.decoders.exact import exact_decoder
from flashvaed_cli.decoders.groups import Kept
from flashvaed_cli.decoders.layout import channels_last, use_channels_last
from flashvaed_cli.errors import CalibrationError
from flashvaed_cli.progress import Progress
from flashvaed_cli.surgery.activations import ActivationStore
from flashvaed_cli.surgery.block_solvers import BLOCK_SOLVERS, ROWS, STUDENT, BlockPair, rows_by_layer
from flashvaed_cli.surgery.layer_fit import FitSettings, LayerError
from flashvaed_cli.surgery.recording import record_block
from flashvaed_cli.surgery.respec import input_tensors
from flashvaed_cli.surgery.transfer import channel_index

Clip = Float[Tensor, "_B _C _T _H _W"]

_REFERENCE = "reference"


def first_changed_block(before: Decoder, after: Decoder) -> str | None:
    """Address of the first block whose spec differs; None when none does."""
    for (address, old), (_, new) in zip(before.spec.blocks(), after.spec.blocks(), strict=True):
        if old != new:
            return address
    return None


@torch.no_grad()
def reconstruct_decoder(
    reference: Decoder,
    student: Decoder,
    kept: Kept,
    clips: Iterable[Float[Tensor, "_B C _T _Hz _Wz"]],
    *,
    first_block: str,
    settings: FitSettings,
    progress: Progress,
) -> list[LayerError]:
    """Solve every layer of `student` from `first_block` on, in place.

    Args:
        reference: the original; its activations are the targets.
        kept: channels that are left, as indices of the reference's.
        clips: raw latents, one calibration clip at a time; consumed once.
        first_block: address of the first block to solve; those before it are only run.
    Returns:
        One line per solved layer: relative error before and after.
    Raises:
        CalibrationError: no clips, NaN, or too few positions for the unknowns.
    """
    inputs = input_tensors(student.spec)
    addresses = [address for address, _ in student.blocks()]
    start = addresses.index(first_block)
    device = next(student.parameters()).device
    generator = torch.Generator().manual_seed(settings.seed)
    errors: list[LayerError] = []
    student = exact_decoder(student)  # over the same weights
    if settings.mode == "full":  # channel mode reads the inputs of every layer, which some exact operators never form
        reference = exact_decoder(reference)
    use_channels_last(reference)
    use_channels_last(student)
    with ActivationStore(str(device)) as store:
        num_clips = _run_prefix(reference, student, addresses[:start], clips, store, device)
        with progress.task("reconstruction", (len(addresses) - start) * num_clips) as task:
            for address in addresses[start:]:
                pair = BlockPair(
                    reference.at(address),
                    student.at(address),
                    channel_index(kept, inputs[address]),
                    channel_index(kept, f"{address}.conv1"),
                    channel_index(kept, address),
                    settings,
                    store,
                    num_clips,
                )
                num_rows = rows_by_layer(pair)
                for clip in range(num_clips):
                    output, rows = record_block(pair.reference, store.load_input(clip, _REFERENCE), num_rows, generator)
                    store.save_input(clip, _REFERENCE, output)
                    store.save(clip, ROWS, rows.to_tensors())
                    task.advance(block=address)
                errors += BLOCK_SOLVERS[student.spec_of(address).kind](pair, address)
                for clip in range(num_clips if address != addresses[-1] else 0):
                    store.save_input(clip, STUDENT, pair.student(store.load_input(clip, STUDENT)))
    return errors


def _run_prefix(
    reference: Decoder,
    student: Decoder,
    addresses: list[str],
    clips: Iterable[Clip],
    store: ActivationStore,
    device: torch.device,
) -> int:
    num_clips = 0
    for latents in clips:
        for name, decoder in ((_REFERENCE, reference), (STUDENT, student)):
            x = channels_last(latents.to(device))
            for address in addresses:
                x = decoder.at(address)(x)
            store.save_input(num_clips, name, x)
        num_clips += 1
    if num_clips == 0:
        raise CalibrationError("no calibration clip was given; pass --data with at least one video")
    return num_clips
