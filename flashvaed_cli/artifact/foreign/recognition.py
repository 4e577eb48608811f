"""Recognise the layout of a checkpoint by names and shapes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from flashvaed_cli.artifact.foreign.layouts import blueprint, slots
from flashvaed_cli.artifact.foreign.other_models import Shapes, looks_like
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.families.layout import Layout, Role
from flashvaed_cli.families.registry import FAMILIES, LAYOUTS, are_one_network, families_named, get_family

# Wrappers that tools put around every name of a VAE.
PREFIXES = ("module.", "_orig_mod.", "vae.", "first_stage_model.", "model.")
ROLES: tuple[Role, ...] = ("decoder", "encoder")
_KNOWN_SHARE = 0.5  # of the names that every variant of a layout has


@dataclass(frozen=True)
class _Fit:
    """How well names fit a layout.

    Attributes:
        share: fraction present of the names that every variant of the layout has.
        number: how many these are; if all names of two layouts are present, the larger number decides.
        fault: the first name that does not fit; "" if all fit.
    """

    share: float
    number: int
    fault: str

    @property
    def rank(self) -> tuple[float, int]:
        return self.share, self.number


def common_prefix(names: Mapping[str, object]) -> str:
    """The wrapper that all names share, possibly of several parts (`module.vae.`); "" if there is none."""
    prefix = ""
    while names:
        for part in PREFIXES:
            if all(name.startswith(prefix + part) for name in names):
                prefix += part
                break
        else:
            break
    return prefix


def recognise(
    shapes: Shapes,
    location: str = "checkpoint",
    *,
    family: str | None = None,
    config_class: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Layout:
    """The layout that these names belong to. Whether all are present is not checked here.

    Of families that are the same network the first is taken: they compute the same.

    Args:
        family: a family, or a word for several (`ltx`), given by the user or by the file; None: detected from the
            names.
        config_class: `_class_name` of the configuration beside the weights; None if there is none.
        config: the whole configuration, for families whose tensors are alike.
    Raises:
        ArtifactError: another model or family, several layouts fit equally, or none does; names the candidates and why
            each failed.
    """
    _refuse_other_models(shapes, location, family, config_class)
    named = () if family is None else families_named(family)
    fits = {
        # For a family that was given, widths are checked when they are read.
        name: _fit_of(shapes, layout, {} if layout.family in named else shapes, config or {})
        for name, layout in LAYOUTS.items()
    }
    candidates = _candidates(family, config_class)
    best, overall = (max(layouts, key=lambda at: fits[at.name].rank) for layouts in (candidates, LAYOUTS.values()))
    rank, top = fits[best.name].rank, fits[overall.name].rank
    if top > rank and top[0] >= _KNOWN_SHARE:
        said = f"of the family {family}" if family else f"of {config_class}, as its configuration says"
        has = "tensors and configuration" if config and family else "tensors"
        fitting = _families(layout for layout in LAYOUTS.values() if fits[layout.name].rank == top)
        why = _why(candidates, {one.name: _fit_of(shapes, one, shapes, config or {}) for one in candidates})
        raise ArtifactError(
            f"{location}: its {has} are not {said}: they fit {_or(fitting)}. {_flags(fitting)} reads it so.\n{why}"
        )
    if rank[0] >= _KNOWN_SHARE:
        alike = [layout for layout in candidates if fits[layout.name].rank == rank]
        if not _tells_statistics(alike, config or {}):
            _refuse_ambiguity(alike, location)
        return best
    why, sample = _why(candidates, fits), ", ".join(list(shapes)[:4])
    for model, names in {one.model: one.model_names for one in LAYOUTS.values() if one.model_names}.items():
        if any(names.search(name) for name in shapes):
            why += f"\nIt has names of an {model} VAE, but not the blocks of a known version."
    named = "" if family is None else f" of the family {family}"
    raise ArtifactError(
        f"{location}: not a checkpoint{named} that this version knows ({len(shapes)} tensors: {sample}, …). "
        f"The layouts tried:\n{why}\n{_what_is_read()}"
    )


def _refuse_other_models(shapes: Shapes, location: str, family: str | None, config_class: str | None) -> None:
    """Refuse other models; a configuration's class takes precedence over the look of the names."""
    look = looks_like(shapes)
    known = {layout.config_class for layout in LAYOUTS.values() if layout.config_class}
    if config_class is not None and config_class not in known and (family is None or look is not None):
        advice = "" if look else " If the weights are of a known family all the same, name it with --family."
        raise ArtifactError(
            f"{location}: its configuration is of {config_class}; this version reads {', '.join(sorted(known))}."
            f"{advice}"
        )
    if look is not None:
        raise ArtifactError(f"{location}: looks like {look}. {_what_is_read()}")


def _tells_statistics(equals: list[Layout], config: Mapping[str, Any]) -> bool:
    """Whether a configuration has all that distinguishes these families: those with factors differ only in these."""
    have_factors = all(get_family(layout.family).config_keys.has_factors for layout in equals)
    return have_factors and any(config.get(key) is not None for key in ("scaling_factor", "latents_mean"))


def _refuse_ambiguity(equals: list[Layout], location: str) -> None:
    """Raise ArtifactError if layouts that fit equally well are of different networks."""
    first = get_family(equals[0].family)
    if all(are_one_network(first, get_family(layout.family)) for layout in equals[1:]):
        return
    raise ArtifactError(
        f"{location}: its names and shapes fit {', '.join(layout.name for layout in equals)} equally well, and these "
        f"compute different things. Choose one with {_flags(_families(equals))}."
    )


def _candidates(family: str | None, config_class: str | None) -> list[Layout]:
    """The layouts of the family that was given, by the user or by the configuration's class; else all."""
    families: Collection[str] = FAMILIES
    if family is not None:
        families = families_named(family)
    elif config_class is not None:
        families = {layout.family for layout in LAYOUTS.values() if layout.config_class == config_class}
    return [layout for layout in LAYOUTS.values() if layout.family in families]


def twins(layout: Layout) -> tuple[str, ...]:
    """Other families with the same network under the same names: only a user or a configuration can distinguish them,
    and they compute the same."""
    family = get_family(layout.family)
    return tuple(
        other.family
        for other in LAYOUTS.values()
        if other.family != layout.family
        and (other.places, other.layers) == (layout.places, layout.layers)
        and are_one_network(get_family(other.family), family)
    )


def _families(layouts: Iterable[Layout]) -> list[str]:
    return list(dict.fromkeys(layout.family for layout in layouts))


def _or(words: list[str]) -> str:
    return " or ".join(words)


def _flags(families: list[str]) -> str:
    return _or([f"--family {family}" for family in families])


def _why(candidates: list[Layout], fits: Mapping[str, _Fit]) -> str:
    """What each layout lacks, the best fits first; one line for all with the same fault."""
    lines: dict[str, list[str]] = {}
    for layout in sorted(candidates, key=lambda one: fits[one.name].rank, reverse=True):
        lines.setdefault(fits[layout.name].fault or "fits", []).append(layout.name)
    return "\n".join(f"  {', '.join(names)}: {fault}" for fault, names in lines.items())


def _what_is_read() -> str:
    return f"This version reads VAEs of the families {', '.join(FAMILIES)}, and its own artifacts."


def present_roles(shapes: Shapes, layout: Layout) -> tuple[Role, ...]:
    """Which of decoder and encoder a checkpoint holds; a 1x1 layer on the latents is not enough."""
    if layout.by_blocks:
        return tuple(role for role in ROLES if any(name.startswith(f"{role}.") for name in shapes))
    return tuple(role for role in ROLES if any(name in shapes for name in _landmarks(layout.name, role)))


@cache
def _landmarks(layout_name: str, role: Role) -> tuple[str, ...]:
    """Names that every variant has, whatever its operators: the norms, and the resamplers' layers on frames."""
    layout = LAYOUTS[layout_name]
    if role in layout.landmarks:
        return tuple(layout.landmarks[role])
    names = slots(blueprint(layout, role), layout)
    return tuple(slot.foreign for slot in names if slot.ours.endswith((".gamma", ".spatial.weight")))


def _fit_of(names: Shapes, layout: Layout, shapes: Shapes, config: Mapping[str, Any]) -> _Fit:
    """By names, unless shapes or the configuration rule the layout out."""
    fit = _fit_of_names(names, layout)
    denial = None if layout.denied is None or fit.rank[0] == 0 else layout.denied(shapes, config)
    return fit if denial is None else _Fit(0.0, 0, fit.fault or denial)


def _fit_of_names(shapes: Shapes, layout: Layout) -> _Fit:
    """By landmarks: the better of both roles. By blocks: the worst of the roles that are present."""
    if layout.by_blocks:
        roles: list[Role] = [role for role in ROLES if any(name.startswith(f"{role}.") for name in shapes)]
        fits = [
            _fit_of_blocks([name for name in shapes if name.startswith(f"{role}.")], layout, role) for role in roles
        ]
        nothing = _Fit(0.0, 0, f"no tensor named {next(iter(layout.places['decoder'].values()))}.*")
        return min(fits, key=lambda fit: fit.rank, default=nothing)
    found: list[_Fit] = []
    for role in ROLES:
        landmarks = _landmarks(layout.name, role)
        missing = [name for name in landmarks if name not in shapes]
        there = len(landmarks) - len(missing)
        found.append(_Fit(there / len(landmarks), there, f"no tensor named {missing[0]}" if missing else ""))
    return max(found, key=lambda fit: fit.rank)


def _fit_of_blocks(names: list[str], layout: Layout, role: Role) -> _Fit:
    """The fraction of the blocks that are present, times that of the names that belong to one.

    Layers inside the blocks may have any operator. Versions differ in whether norms are conditioned on a timestep (or
    have shifts instead): if that differs, nothing fits.
    """
    places = [f"{place}." for place in layout.places[role].values() if place != role]
    missing = [place for place in places if not any(name.startswith(place) for name in names)]
    known = (*places, f"{role}.conv_out.", f"{role}.norm_out.")
    conditions = [] if layout.condition is None else [name for name in names if layout.condition.search(name)]
    strange = [name for name in names if not name.startswith(known) and name not in conditions]
    shifted = next((name for name in names if name in conditions or name.endswith(".norm1.bias")), None)
    fault = f"no tensor named {missing[0]}*" if missing else f"no place for {strange[0]}" if strange else ""
    if role == "decoder" and (shifted is not None) != layout.is_shifted:
        if shifted is None:
            other = f"no tensor named {role}.timestep_scale_multiplier, on which its norms are conditioned"
        else:
            other = f"no place for {shifted}: its norms are not conditioned on a timestep"
        return _Fit(0.0, 0, fault or other)
    return _Fit((1 - len(missing) / len(places)) * (1 - len(strange) / len(names)), 0, fault)
