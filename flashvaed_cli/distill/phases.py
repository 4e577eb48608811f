"""The three phases as data: what trains, what is matched, what is held still.

1. The converted deep stages learn to reproduce the teacher's features; everything else is frozen.
2. Before pruning, the whole decoder trains while L_ce makes the channels to be pruned linearly
   dependent on the kept ones. The weights that produce the channels to be pruned are held still, so that
   these do not collapse towards the kept ones.
3. After pruning, the whole decoder trains; narrower tensors are matched through a 1x1 projection,
   or by the index of their kept channels.

Reference: arXiv 2602.19161, section 3.3.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.spec.addresses import stage_of
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.groups import ChannelGroup, is_gated, producers
from flashvaed_cli.errors import DistillationError, SpecError

Channels = tuple[int, ...]
Projection = tuple[Tensor, Tensor]
"""Weight `[C, K]` and bias `[C]` of the map from the kept channels to all."""


@dataclass(frozen=True, eq=False)
class FeatureMatch:
    """One tensor in which the student should match its teacher.

    Channel i of the student corresponds to channel i of the teacher; with `kept`, to channel `kept[i]`;
    with `projection`, the student's channels are first mapped to all of the teacher's.
    """

    address: str
    kept: Channels | None = None
    projection: Projection | None = None


@dataclass(frozen=True, eq=False)
class PhasePlan:
    """What one phase does.

    Attributes:
        number: 1, 2 or 3.
        trained_stages: the stages whose weights train; the others are frozen.
        matches: the tensors of the feature loss.
        to_keep: phase 2: the channels that will be kept, by the address of the block or layer that outputs them.
        unmatched: tensors that the feature loss leaves out, because the widths differ and the kept
            channels are not recorded.
    """

    number: int
    trained_stages: tuple[str, ...]
    matches: tuple[FeatureMatch, ...]
    to_keep: Mapping[str, Channels] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()


def swapped_stages(student: DecoderSpec, teacher: DecoderSpec) -> tuple[str, ...]:
    """The stages in which some layer's operator differs from the teacher's, in forward order.

    A shortcut that only one of the two has comes from pruning and does not count.
    """
    originals = {address: layer.operator for address, layer in teacher.layers()}
    changed = {
        stage_of(address)
        for address, layer in student.layers()
        if originals.get(address, layer.operator) != layer.operator
    }
    return tuple(stage.name for stage in student.stages if stage.name in changed)


def plan_phase_1(
    student: DecoderSpec,
    teacher: DecoderSpec,
    *,
    shallow_stages: Collection[str],
    kept_channels: Mapping[str, Channels] | None = None,
) -> PhasePlan:
    """Train the converted stages, except the shallow ones, and match their features.

    Args:
        shallow_stages: the family's.
        kept_channels: which of the teacher's channels the student's are, where it was pruned already.
    Raises:
        DistillationError: no deep stage was converted.
        SpecError: student and teacher do not have the same blocks, or an address is unknown.
    """
    trained = tuple(name for name in swapped_stages(student, teacher) if name not in shallow_stages)
    if not trained:
        raise DistillationError(
            "Phase 1 trains the deep stages whose operators were changed, and this decoder has none: "
            "run convert-ops first, or leave phase 1 out."
        )
    addresses = [a for a in _block_addresses(student, teacher) if stage_of(a) in trained]
    matches, unmatched = _match(student, teacher, addresses, kept_channels or {}, {})
    return PhasePlan(number=1, trained_stages=trained, matches=matches, unmatched=unmatched)


def plan_phase_2(student: DecoderSpec, teacher: DecoderSpec, *, to_keep: Mapping[str, Channels]) -> PhasePlan:
    """Train everything on an unpruned decoder, with L_ce on the tensors that will be pruned.

    Args:
        to_keep: channels that will be kept, by the address of the block or layer that outputs them.
    Raises:
        DistillationError: nothing will be pruned, or one of these tensors is already narrower than the teacher's.
        SpecError: student and teacher do not have the same blocks, or an address is unknown.
    """
    if not to_keep:
        raise DistillationError(
            "Phase 2 prepares channels for pruning, but none are chosen: give a ratio, or leave phase 2 out."
        )
    addresses = _block_addresses(student, teacher)
    student_widths, teacher_widths = _tensor_widths(student), _tensor_widths(teacher)
    for address, kept in to_keep.items():
        _require_known(address, student_widths)
        if student_widths[address] != teacher_widths.get(address):
            raise DistillationError(
                f"Phase 2 comes before pruning, but {address} has {student_widths[address]} channels where the "
                f"original has {teacher_widths.get(address)}: distill first and prune after it, or leave phase 2 out."
            )
        _require_indices(address, kept, student_widths[address])
    matches, unmatched = _match(student, teacher, addresses, {}, {})
    names = tuple(stage.name for stage in student.stages)
    return PhasePlan(number=2, trained_stages=names, matches=matches, to_keep=dict(to_keep), unmatched=unmatched)


def plan_phase_3(
    student: DecoderSpec,
    teacher: DecoderSpec,
    *,
    kept_channels: Mapping[str, Channels] | None = None,
    projections: Mapping[str, Projection] | None = None,
) -> PhasePlan:
    """Train everything; match every block's output, and the inner tensors that the arguments name.

    Args:
        kept_channels: which of the teacher's channels the student has, by block or layer address.
        projections: least-squares maps from the kept channels to all; they take precedence over `kept_channels`.
    Raises:
        DistillationError: a map or a set does not fit the widths.
        SpecError: student and teacher do not have the same blocks, or an address is unknown.
    """
    kept_channels, projections = kept_channels or {}, projections or {}
    blocks = _block_addresses(student, teacher)
    inside = [a for a in dict.fromkeys([*kept_channels, *projections]) if a not in blocks]
    matches, unmatched = _match(student, teacher, [*blocks, *inside], kept_channels, projections)
    names = tuple(stage.name for stage in student.stages)
    return PhasePlan(number=3, trained_stages=names, matches=matches, unmatched=unmatched)


def plan_other_shape(student: DecoderSpec) -> PhasePlan:
    """Phase 3 for a student whose blocks have no counterparts in the original: everything trains, on frames alone."""
    return PhasePlan(number=3, trained_stages=tuple(stage.name for stage in student.stages), matches=())


def trained_parameters(student: Decoder, plan: PhasePlan) -> dict[str, nn.Parameter]:
    """The parameters that train in a phase, by name."""
    return {
        name: parameter for name, parameter in student.named_parameters() if name.split(".")[1] in plan.trained_stages
    }


def gradient_masks(student: Decoder, plan: PhasePlan) -> dict[str, Tensor]:
    """Phase 2: factors for the gradients, by parameter name; 0 where a channel to be pruned is produced.

    Covers weight rows and bias of the layers that write to the tensors in `plan.to_keep`: for a residual
    block, conv2 and its shortcut. Everything upstream of these layers still trains.
    """
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    masks: dict[str, Tensor] = {}
    for address, kept in plan.to_keep.items():
        tensor = ChannelGroup(address, stage_of(address), _tensor_widths(student.spec)[address], (address,))
        for layer in map(student.at, producers(student.spec, tensor)):
            for parameter in (layer.get_parameter("weight"), layer.get_parameter("bias")):
                cell = len(parameter) // tensor.width  # outputs per channel, of a bypass or before a shuffle
                mask = torch.zeros(parameter.shape[0], *([1] * (parameter.ndim - 1)), device=parameter.device)
                if is_gated(student.spec, address):
                    mask.unflatten(0, (cell, tensor.width))[:, list(kept)] = 1
                else:
                    mask.unflatten(0, (tensor.width, cell))[list(kept)] = 1
                masks[names[id(parameter)]] = mask
    return masks


def _block_addresses(student: DecoderSpec, teacher: DecoderSpec) -> list[str]:
    """Every block but the last, whose output is the frames."""
    addresses = [address for address, _ in student.blocks()]
    if addresses != [address for address, _ in teacher.blocks()]:
        raise SpecError(
            f"Student ({student.family}) and original ({teacher.family}) do not have the same stages and blocks: "
            "give the original that this decoder was made from."
        )
    return addresses[:-1]


def _tensor_widths(spec: DecoderSpec) -> dict[str, int]:
    """Channels of every block's and every layer's output, by address."""
    widths: dict[str, int] = {}
    for address, block in spec.blocks():
        widths[address] = block.out_width
        widths.update({f"{address}.{name}": layer.out_width for name, layer in block.layers.items()})
        widths.update({f"{address}.{name}": inner.width for name, inner in block.inner_tensors.items()})
    return widths


def _match(
    student: DecoderSpec,
    teacher: DecoderSpec,
    addresses: Collection[str],
    kept_channels: Mapping[str, Channels],
    projections: Mapping[str, Projection],
) -> tuple[tuple[FeatureMatch, ...], tuple[str, ...]]:
    """How each tensor is matched, and the ones that cannot be."""
    narrow, wide = _tensor_widths(student), _tensor_widths(teacher)
    matches: list[FeatureMatch] = []
    unmatched: list[str] = []
    for address in addresses:
        _require_known(address, narrow)
        _require_known(address, wide)
        if address in projections:
            weight, bias = projections[address]
            if weight.shape != (wide[address], narrow[address]) or bias.shape != (wide[address],):
                raise DistillationError(
                    f"{address}: a projection from {narrow[address]} to {wide[address]} channels is needed, "
                    f"got weight {tuple(weight.shape)} and bias {tuple(bias.shape)}."
                )
            matches.append(FeatureMatch(address, projection=(weight, bias)))
        elif address in kept_channels:
            kept = kept_channels[address]
            _require_indices(address, kept, wide[address])
            if len(kept) != narrow[address]:
                raise DistillationError(f"{address} has {narrow[address]} channels, but {len(kept)} are named as kept.")
            matches.append(FeatureMatch(address, kept=tuple(kept)))
        elif narrow[address] == wide[address]:
            matches.append(FeatureMatch(address))
        else:
            unmatched.append(address)
    return tuple(matches), tuple(unmatched)


def _require_known(address: str, widths: Mapping[str, int]) -> None:
    if address not in widths:
        raise SpecError(f"'{address}' is not a block or layer of this decoder; it has {', '.join(widths)}.")


def _require_indices(address: str, kept: Channels, width: int) -> None:
    if not kept or len(set(kept)) != len(kept) or min(kept) < 0 or max(kept) >= width:
        raise DistillationError(
            f"{address}: kept channels must be distinct numbers in 0..{width - 1}, got {list(kept)}."
        )
