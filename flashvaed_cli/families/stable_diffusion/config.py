"""What configurations of an `AutoencoderKL` say and shapes do not show: the groups of its norms, whose latents it has.

Reference: the constructor of diffusers' class and the configurations of the releases (facts only).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from flashvaed_cli.decoders.spec.blocks import BlockSpec, ResBlockSpec
from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec, EncoderSpec
from flashvaed_cli.errors import SpecError
from flashvaed_cli.families.family import ConfigKeys, Contradiction
from flashvaed_cli.families.ladder import post_quant_stage, quant_stage

SpecT = TypeVar("SpecT", bound=CoderSpec)

MULTIPLIERS = (1, 2, 4, 4)
NUM_GROUPS = 32
"""Groups of every norm of the releases; `norm_num_groups` of a configuration takes precedence."""

EACH_GROUPS = "decoder_norm_groups"
"""Our own key, for decoders with fewer groups after pruning: those of each norm, in forward order."""
QUANT_KEYS = {"decoder": "use_post_quant_conv", "encoder": "use_quant_conv"}
_QUANT_STAGES = {"decoder": "post_quant", "encoder": "quant"}
_CLASS_SCALING = 0.18215  # the class's default, for configurations without one, as the oldest are


def configured(spec: SpecT, config: Mapping[str, Any]) -> SpecT:
    """The original's spec with the groups of a checkpoint's norms, and with or without the 1x1 layer on the latents.

    Raises:
        SpecError: a value that is not supported; names the key.
    """
    has_quant = config.get(QUANT_KEYS[spec.role])
    if has_quant is not None:
        if not isinstance(has_quant, bool):
            raise SpecError(f"{QUANT_KEYS[spec.role]} is {has_quant!r}; supported: true, false")
        spec = _with_quant(spec, has_quant=has_quant)
    return _with_groups(spec, _groups_of(spec, config))


def described(spec: CoderSpec) -> dict[str, Any]:
    """The configuration for which `configured` restores what shapes do not show; empty for coders without GroupNorm."""
    groups = _norm_groups(spec)
    if not groups:  # a light decoder for the same latents
        return {}
    found: dict[str, Any] = {
        "norm_num_groups": Counter(groups).most_common(1)[0][0],
        QUANT_KEYS[spec.role]: _has_quant(spec),
    }
    return {**found, EACH_GROUPS: groups} if spec.role == "decoder" and set(groups) != {NUM_GROUPS} else found


def contradictions(
    family: str, latent_width: int, spec: CoderSpec, config: Mapping[str, Any]
) -> Iterator[Contradiction]:
    """Another variant's latents, and a 1x1 layer on the latents that only one of configuration and weights has."""
    assert isinstance(spec, DecoderSpec | EncoderSpec)
    if spec.latent_width != latent_width:
        yield Contradiction(f"latent_channels of {family}", latent_width, spec.latent_width)
    key = QUANT_KEYS[spec.role]
    if key in config and config[key] is not _has_quant(spec):
        yield Contradiction(key, config[key], _has_quant(spec))


def statistics_config(mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """Latent statistics as keys of the class's configuration: factors if they are the same for all channels."""
    if len(set(mean)) > 1 or len(set(std)) > 1:
        lists = {"latents_mean": list(mean), "latents_std": list(std)}
        return {"scaling_factor": 1.0, "shift_factor": None, **lists}
    scaling_factor = float(f"{1 / std[0]:.9g}")
    return {
        "scaling_factor": scaling_factor,
        "shift_factor": mean[0] or None,
        "latents_mean": None,
        "latents_std": None,
    }


def said_of_others(
    latent_width: int, scaling_factor: float, others: Sequence[float], config: Mapping[str, Any]
) -> str | None:
    """What in a configuration shows that weights are another variant's of the same latent width; None if nothing.

    Args:
        others: scaling factors of those variants.
    """
    said, why = config.get("scaling_factor"), ""
    if said is None and "_class_name" in config and _CLASS_SCALING in (scaling_factor, *others):
        said, why = _CLASS_SCALING, ", the class's default"
    if not isinstance(said, int | float) or not any(math.isclose(said, other, rel_tol=1e-4) for other in others):
        return None
    return (
        f"its configuration has scaling_factor {said}{why}, not the {scaling_factor} of these {latent_width} channels"
    )


def _groups_of(spec: CoderSpec, config: Mapping[str, Any]) -> list[int]:
    number, each = len(_norm_groups(spec)), config.get(EACH_GROUPS)
    if each is None or spec.role != "decoder":
        groups = config.get("norm_num_groups", NUM_GROUPS)
        if not _is_count(groups):
            raise SpecError(f"norm_num_groups is {groups!r:.40}; supported: a whole number above 0")
        return [groups] * number
    if not isinstance(each, list | tuple) or len(each) != number or not all(map(_is_count, each)):
        raise SpecError(f"{EACH_GROUPS} is {each!r:.80}; supported: {number} whole numbers above 0")
    return list(each)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _norm_groups(spec: CoderSpec) -> list[int]:
    """The groups of every GroupNorm in forward order."""
    norms = [norm for _, block in spec.blocks() for norm, _ in block.norms.values()]
    return [norm.groups for norm in norms if norm.groups is not None]


def _with_groups(spec: SpecT, groups: Sequence[int]) -> SpecT:
    """The spec with other groups, which need not divide its widths: that is checked for a checkpoint's own widths."""
    remaining = iter(groups)
    changed: dict[str, BlockSpec] = {}
    for address, block in spec.blocks():
        norms = [norm.model_copy(update={"groups": next(remaining)}) for norm, _ in block.norms.values()]
        if isinstance(block, ResBlockSpec):
            update = {"norm": norms[0], "norm2": None if norms[1] == norms[0] else norms[1]}
            changed[address] = block.model_copy(update=update)
        elif norms:
            changed[address] = block.model_copy(update={"norm": norms[0]})
    return cast(SpecT, spec.with_blocks(changed))


def _has_quant(spec: CoderSpec) -> bool:
    return any(stage.name == _QUANT_STAGES[spec.role] for stage in spec.stages)


def _with_quant(spec: SpecT, *, has_quant: bool) -> SpecT:
    if has_quant == _has_quant(spec):
        return spec
    stages = [stage for stage in spec.stages if stage.name != _QUANT_STAGES[spec.role]]
    if has_quant:
        assert isinstance(spec, DecoderSpec | EncoderSpec)
        is_decoder = isinstance(spec, DecoderSpec)
        added = post_quant_stage(spec.latent_width) if is_decoder else quant_stage(spec.latent_width)
        stages = [added, *stages] if is_decoder else [*stages, added]
    return type(spec)(**{**dict(spec), "stages": tuple(stages)})


CONFIG_KEYS = ConfigKeys(
    fixed={
        "in_channels": (3,),
        "out_channels": (3,),
        "act_fn": ("silu",),
        "layers_per_block": (2,),
        "down_block_types": (("DownEncoderBlock2D",) * len(MULTIPLIERS),),
        "up_block_types": (("UpDecoderBlock2D",) * len(MULTIPLIERS),),
        "mid_block_add_attention": (True,),
    },
    read=frozenset({*QUANT_KEYS.values(), "norm_num_groups", "shift_factor", EACH_GROUPS}),
    idle=frozenset({"sample_size", "force_upcast"}),
    latent_key="latent_channels",
    widths=dict.fromkeys(("decoder", "encoder"), (("block_out_channels", MULTIPLIERS),)),
    in_metadata=True,
    has_factors=True,
)
