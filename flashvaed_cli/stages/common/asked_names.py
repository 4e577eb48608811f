"""Check the names of stages and channel groups in a recipe or flag before any work begins."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.groups import channel_groups
from flashvaed_cli.errors import SpecError
from flashvaed_cli.families.registry import has_family_blocks, shallow_stages
from flashvaed_cli.recipe.convert_ops import ConvertOpsRecipe
from flashvaed_cli.recipe.settings import RatioFields
from flashvaed_cli.surgery.respec import NOTHING_TO_CONVERT, main_layers


def require_known_ratios(recipe: RatioFields, spec: DecoderSpec) -> None:
    """Refuse ratios for stages and channel groups that the decoder lacks.

    Raises:
        SpecError: names the source (a recipe file and its key, or the flag), the names that exist, and what to do.
    """
    groups = channel_groups(spec)
    shallow = shallow_stages(spec)
    stages = [stage.name for stage in spec.stages if any(group.stage == stage.name for group in groups)]
    for field, kind, known in (
        ("stage_keep_ratios", "stage", stages),
        ("group_keep_ratios", "channel group", [group.name for group in groups]),
    ):
        ratios = getattr(recipe, field)
        for name in _unknown(ratios, known):
            mending = "give one of these"
            if recipe.origin(field, name) is not None:
                mending = (
                    f"change it there, or replace all ratios of the recipe by --ratio {ratios[name]:g}, which is for "
                    f"{_listed(shallow)}, the stages that are pruned in {spec.family}"
                )
            asked = recipe.origin(field, name) or f"--ratio {name}={ratios[name]:g}"
            raise SpecError(f"{asked}: this decoder has no {kind} '{name}', but {', '.join(known)}: {mending}")


def require_known_operators(recipe: ConvertOpsRecipe, spec: DecoderSpec) -> None:
    """Refuse operators for stages that the decoder lacks, or that have nothing to convert.

    Raises:
        SpecError: as `require_known_ratios`.
    """
    stages = [stage.name for stage in spec.stages if main_layers(stage)]
    if not stages:
        raise SpecError(
            f"the decoder of {spec.family} has no dense residual blocks to convert: its layers are depthwise and "
            "pointwise already. `flashvaed prune` narrows what is inside its blocks"
        )
    for name in _unknown(recipe.operators, stages):
        origin = recipe.origin("operators", name)
        asked = origin or f"--operator {name}={recipe.operators[name]}"
        exists = name in [stage.name for stage in spec.stages]
        fault = f"stage '{name}' {NOTHING_TO_CONVERT}" if exists else f"this decoder has no stage '{name}'"
        mending = "give one of these" if origin is None else "change it there, or leave it to the profile"
        raise SpecError(f"{asked}: {fault}, but {', '.join(stages)}: {mending}")


def require_own_blocks(spec: DecoderSpec, location: str) -> None:
    """Refuse to convert the operators of a decoder that is not made of its family's blocks.

    Raises:
        SpecError: its blocks are others.
    """
    if not has_family_blocks(spec):
        raise SpecError(
            f"{location}: --profile paper lays out the operators of {spec.family}'s own blocks, and this decoder has "
            "others, which are light already. For the same frames in less time: --profile exact"
        )


def _unknown(names: Iterable[str], known: Collection[str]) -> list[str]:
    return [name for name in names if name not in known]


def _listed(names: Iterable[str]) -> str:
    return " and ".join(names)
