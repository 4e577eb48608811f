"""Modules from state dicts: ours, filled with a file's weights, and those that another layout holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from flashvaed_cli.artifact.foreign.layouts import slots
from flashvaed_cli.artifact.foreign.mismatch import Shape, compare_shapes, require_float
from flashvaed_cli.artifact.foreign.recognition import present_roles
from flashvaed_cli.artifact.foreign.shape_reading import spec_from_shapes
from flashvaed_cli.decoders.modules.coder import Coder, Decoder, Encoder
from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec, EncoderSpec
from flashvaed_cli.errors import ArtifactError, is_out_of_memory
from flashvaed_cli.families.layout import Layout, Role
from flashvaed_cli.families.separable import fold_separable

_LATENT_LAYERS: tuple[tuple[Role, str], ...] = (("decoder", "post_quant.0"), ("encoder", "quant.0"))


def coders_from_foreign(
    tensors: Mapping[str, Tensor],
    layout: Layout,
    location: str = "checkpoint",
    config: Mapping[str, Any] | None = None,
) -> dict[Role, Coder]:
    """The decoder, the encoder or both that a state dict of another layout holds.

    Args:
        config: of the checkpoint, for what the tensors do not show.
    Raises:
        ArtifactError: tensors are missing, superfluous or of another shape; names them.
    """
    config = {**(config or {}), **({} if layout.implied is None else layout.implied(tensors))}
    _require_floats(tensors, layout, location)
    raw, tensors = tensors, _prepared(tensors, layout, config, location)
    shapes = shapes_of(tensors)
    roles = present_roles(shapes_of(raw) if layout.landmarks else shapes, layout)
    specs = {role: spec_from_shapes(shapes, layout, role, location, config) for role in roles}
    places = {role: slots(spec, layout) for role, spec in specs.items()}
    expected = {slot.foreign: slot.shape for slots_of_role in places.values() for slot in slots_of_role}
    # Half a VAE may keep the other half's 1x1 layer on the latents, as released students do.
    spare = {
        f"{layout.places[role][address]}.{end}"
        for role, address in _LATENT_LAYERS
        if role not in roles and address in layout.places[role]
        for end in ("weight", "bias")
    }
    compare_shapes(expected, shapes, spare).raise_if_any(location, layout.name)
    coders: dict[Role, Coder] = {}
    for role in roles:
        coders[role] = empty_coder(specs[role])
        fill_coder(coders[role], {slot.ours: tensors[slot.foreign] for slot in places[role]}, location)
    return coders


def _require_floats(tensors: Mapping[str, Tensor], layout: Layout, location: str) -> None:
    """Raise ArtifactError, with its name, if a weight or a statistic is no float; other tensors may be counters."""
    tops = {place.partition(".")[0] for places in layout.places.values() for place in places.values()}
    for name, tensor in tensors.items():
        if name.partition(".")[0] in tops or name in (layout.statistics or ()):
            require_float(name, tensor, location)


def _prepared(
    tensors: Mapping[str, Tensor], layout: Layout, config: Mapping[str, Any], location: str
) -> dict[str, Tensor]:
    """The tensors found, converted to those that the layout names."""
    try:
        return fold_separable(tensors if layout.prepare is None else layout.prepare(tensors, config))
    except (ValueError, IndexError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise ArtifactError(
            f"{location}: its tensors do not fit the {layout.name} layout: {error!s:.300}. "
            "The file is damaged, or of another model; nothing was loaded."
        ) from error


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """The shapes of tensors, by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def named_tensors(coder: Coder) -> Iterable[tuple[str, Tensor]]:
    """The tensors of a module that files hold, with their names."""
    return coder.state_dict().items()


class CoderPair(TypedDict):
    """The parts of a VAE in a checkpoint."""

    decoder: Decoder | None
    encoder: Encoder | None


def as_roles(coders: Mapping[Role, Coder]) -> CoderPair:
    """The coders as the two parts of a VAE."""
    decoder, encoder = coders.get("decoder"), coders.get("encoder")
    assert decoder is None or isinstance(decoder, Decoder)
    assert encoder is None or isinstance(encoder, Encoder)
    return {"decoder": decoder, "encoder": encoder}


def empty_coder(spec: CoderSpec) -> Coder:
    """The module of a spec without weights (on the meta device), for `fill_coder`."""
    with torch.device("meta"):
        return Encoder(spec) if isinstance(spec, EncoderSpec) else Decoder(cast(DecoderSpec, spec))


def fill_coder(coder: Coder, tensors: Mapping[str, Tensor], location: str) -> None:
    """Give a module its weights: float32 copies on the CPU, eval mode, no gradients. Axes of length 1 may differ.

    Raises:
        ArtifactError: quantised weights.
    """
    state: dict[str, Tensor] = {}
    for name, empty in named_tensors(coder):
        tensor = tensors[name]
        require_float(name, tensor, location)
        # Always a copy: the file of a mapped tensor may change.
        state[name] = tensor.to(torch.float32, copy=True).reshape(empty.shape).contiguous()
    coder.load_state_dict(state, strict=True, assign=True)
    coder.eval().requires_grad_(False)
