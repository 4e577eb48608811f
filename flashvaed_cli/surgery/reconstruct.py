"""Closed-form reconstruction: solve each layer of a changed decoder against the original, in forward order.

Two decoders run side by side on the same clips. Inputs are what the *new* decoder really feeds a layer, so
each solve also makes up for the errors of the layers before it; targets are what the *original* computes
there, on the kept channels. Nothing is trained. The original runs once per block and clip, and only its rows at
sampled positions are kept; the activations between blocks are on disk. So memory holds the sums of one layer and
the activations of one clip, however many clips there are.

Reference: arXiv 2602.19161 trains these layers; this is a departure (flashvaed_cli/README.md, "Method").
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from flashvaed_cli.decoders.modules.bypass import Bypass
from flashvaed_cli.decoders.modules.coder import Coder
from flashvaed_cli.decoders.modules.memory_format import channels_last, use_channels_last
from flashvaed_cli.decoders.spec.addresses import split_block, stage_of
from flashvaed_cli.decoders.spec.groups import Kept, input_tensors
from flashvaed_cli.decoders.variants.exact import exact_coder
from flashvaed_cli.errors import CalibrationError
from flashvaed_cli.progress import Progress
from flashvaed_cli.surgery.activations import ActivationStore
from flashvaed_cli.surgery.layer_fit import FitSettings, LayerError
from flashvaed_cli.surgery.recording import record_block
from flashvaed_cli.surgery.solvers.bypass import solve_bypass
from flashvaed_cli.surgery.solvers.pair import Entering, Pair
from flashvaed_cli.surgery.solvers.table import BLOCK_SOLVERS
from flashvaed_cli.surgery.transfer import Channels, channel_index, inner_channels

Clip = Float[Tensor, "_B _C _T _H _W"]

_BLOCK = Entering("reference", "student")
_STAGE = Entering("reference_entering", "student_entering")
"""Names in the store: of the inputs of the next block, and of those of the stage whose bypass is still to come."""


def first_changed_block(before: Coder, after: Coder) -> str | None:
    """Address of the first block whose spec differs; None when none does."""
    for (address, old), (_, new) in zip(before.spec.blocks(), after.spec.blocks(), strict=True):
        if old != new:
            return address
    return None


@torch.no_grad()
def reconstruct_coder(
    reference: Coder,
    student: Coder,
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
        kept: kept channels by tensor address, as indices of the reference's.
        clips: raw latents (of an encoder, pixels), one calibration clip at a time; consumed once.
        first_block: address of the first block to solve; those before it are only run.
    Returns:
        One line per solved layer: relative error before and after.
    Raises:
        CalibrationError: no clips, NaN, or too few positions for the unknowns.
    """
    addresses = [address for address, _ in student.blocks()]
    start = addresses.index(first_block)
    device = next(student.parameters()).device
    generator = torch.Generator().manual_seed(settings.seed)
    errors: list[LayerError] = []
    student = exact_coder(student)  # over the same weights
    # Channel mode reads the inputs of every layer, which some exact operators never form.
    if settings.mode == "full":
        reference = exact_coder(reference)
    use_channels_last(reference)
    use_channels_last(student)
    with ActivationStore(str(device)) as store:
        num_clips = _run_prefix(reference, student, first_block, clips, store, device)
        pairing = _Pairing(reference, student, kept, settings, store, num_clips)
        with progress.task("reconstruction", (len(addresses) - start) * num_clips) as task:
            for address in addresses[start:]:
                pairing.keep_entering(address)
                pair, bypass = pairing.blocks_at(address), pairing.bypasses_at(address)
                solver = BLOCK_SOLVERS[student.spec_of(address).kind]
                num_rows = solver.num_rows(pair)
                for clip in range(num_clips):
                    entering = store.load_input(clip, _BLOCK.reference)
                    output, rows = record_block(pair.reference, entering, num_rows, generator)
                    if bypass is not None:
                        output = bypass.reference(output, store.load_input(clip, _STAGE.reference), is_first=True)
                    store.save_input(clip, _BLOCK.reference, output)
                    pair.save_rows(clip, rows)
                    task.advance(block=address)
                if bypass is not None:
                    errors += solve_bypass(bypass, student.spec_of(address), generator)
                errors += solver.solve(pair)
                for clip in range(num_clips if address != addresses[-1] else 0):
                    output = pair.student(store.load_input(clip, _BLOCK.student))
                    if bypass is not None:
                        output = bypass.student(output, store.load_input(clip, _STAGE.student), is_first=True)
                    store.save_input(clip, _BLOCK.student, output)
    return errors


@dataclass(frozen=True)
class _Pairing:
    """Pairs the parts of two decoders by address."""

    reference: Coder
    student: Coder
    kept: Kept
    settings: FitSettings
    store: ActivationStore
    num_clips: int

    def blocks_at(self, address: str) -> Pair[nn.Module]:
        """A block and its successor."""
        return Pair(
            address=address,
            reference=self.reference.at(address),
            student=self.student.at(address),
            before=self._channels_before(address),
            inner=inner_channels(self.kept, address, self.student.spec_of(address)),
            after=channel_index(self.kept, address),
            settings=self.settings,
            store=self.store,
            num_clips=self.num_clips,
            entering=_BLOCK,
        )

    def bypasses_at(self, address: str) -> Pair[Bypass] | None:
        """The bypass that ends with a block and its successor; None if none does."""
        stage = self.student.spec.bypassed().get(address)
        if stage is None:
            return None
        return Pair(
            address=address,
            reference=self.reference.bypass_of(stage.name),
            student=self.student.bypass_of(stage.name),
            before=self._channels_before(f"{stage.name}.0"),
            after=channel_index(self.kept, address),
            settings=self.settings,
            store=self.store,
            num_clips=self.num_clips,
            entering=_STAGE,
        )

    def keep_entering(self, address: str) -> None:
        """At the first block of a stage with a bypass, keep the stage's input."""
        stage, index = split_block(address)
        if index == 0 and stage in self.student.bypasses:
            for clip in range(self.num_clips):
                for name, kept_name in zip(_BLOCK, _STAGE, strict=True):
                    self.store.save_input(clip, kept_name, self.store.load_input(clip, name))

    def _channels_before(self, address: str) -> Channels:
        return channel_index(self.kept, input_tensors(self.student.spec)[address])


def _run_prefix(
    reference: Coder,
    student: Coder,
    first_block: str,
    clips: Iterable[Clip],
    store: ActivationStore,
    device: torch.device,
) -> int:
    """Run both decoders up to the first block to solve, and store what they feed it; returns the number of clips.

    Where both compute the same up to there, one runs for both.
    """
    stage = stage_of(first_block)
    entrance = input_tensors(student.spec)[f"{stage}.0"] if stage in student.bypasses else None
    names = list(zip(_BLOCK, _STAGE, strict=True))
    runs = [(reference, names[:1]), (student, names[1:])]
    if _alike_before(first_block, reference, student):
        runs = [(reference, names)]
    num_clips = 0
    for latents in clips:
        for decoder, stored_as in runs:
            x = channels_last(decoder.enter(latents.to(device)))
            for address, output in decoder.walk(x, stop=first_block):
                x = output
                if address == entrance:
                    for _, stage_name in stored_as:
                        store.save_input(num_clips, stage_name, x)
            for name, _ in stored_as:
                store.save_input(num_clips, name, x)
        num_clips += 1
    if num_clips == 0:
        raise CalibrationError("no calibration clip was given; pass --data with at least one video")
    return num_clips


def _alike_before(stop: str, first: Coder, second: Coder) -> bool:
    """Whether two coders have the same operators and weights in all blocks, and bypasses, that end before `stop`."""
    if first.spec.patch != second.spec.patch:
        return False
    pairs = zip(first.spec.blocks(), second.spec.blocks(), strict=True)
    for (address, one), (_, other) in itertools.takewhile(lambda pair: pair[0][0] != stop, pairs):
        parts = [(first.at(address), second.at(address))]
        if (stage := first.spec.bypassed().get(address)) is not None:
            if stage != second.spec.bypassed().get(address):
                return False
            parts.append((first.bypass_of(stage.name), second.bypass_of(stage.name)))
        if one != other or not all(itertools.starmap(_have_equal_weights, parts)):
            return False
    return True


def _have_equal_weights(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
