"""Tell from names and shapes which layout a checkpoint has, or what else it looks like."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from flashvaed_cli.artifact.key_tables import LAYOUTS
from flashvaed_cli.artifact.layouts import Layout, Role, blueprint, slots
from flashvaed_cli.artifact.mismatch import Shape
from flashvaed_cli.decoders.families import FAMILIES, get_family
from flashvaed_cli.errors import ArtifactError

Shapes = Mapping[str, Shape]

# Wrappers that tools put around every name of a VAE.
PREFIXES = ("module.", "_orig_mod.", "vae.", "first_stage_model.", "model.")
ROLES: tuple[Role, ...] = ("decoder", "encoder")
_KNOWN_SHARE = 0.5  # of the names that every variant of a layout has


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
    shapes: Shapes, location: str = "checkpoint", *, family: str | None = None, config_class: str | None = None
) -> Layout:
    """The layout whose names these are. Whether all are there is not checked here.

    Args:
        family: the family that the user names; None: told from the names.
        config_class: `_class_name` of the configuration beside the weights; None if there is none.
    Raises:
        ArtifactError: another model, or none that this version knows; names the candidates and what each lacks.
    """
    look = looks_like(shapes)
    if look is not None:
        raise ArtifactError(f"{location}: looks like {look}. {_what_is_read()}")
    candidates = _candidates(location, family, config_class)
    shares = {layout.name: _best_share(shapes, layout) for layout in candidates}
    # Where all names of two are there, the one with more of them; the first of equals.
    best = max(candidates, key=lambda layout: shares[layout.name][:2])
    share = shares[best.name][0]
    rivals = [c.name for c in candidates if shares[c.name][:2] == shares[best.name][:2] and c.places != best.places]
    if share >= _KNOWN_SHARE and not rivals:
        return best
    if share >= _KNOWN_SHARE:
        raise ArtifactError(
            f"{location}: its names fit {', '.join([best.name, *rivals])} alike. Say which it is with --family."
        )
    why = "\n".join(f"  {name}: no tensor named {missing}" for name, (*_, missing) in shares.items())
    sample = ", ".join(list(shapes)[:4])
    if _LTX(shapes):
        why += "\nIt has names of an LTX-Video VAE, but not the blocks of a version that is known."
    named = "" if family is None else f" of the family {family}"
    raise ArtifactError(
        f"{location}: not a checkpoint{named} that this version knows ({len(shapes)} tensors: {sample}, …). "
        f"The layouts tried:\n{why}\n{_what_is_read()}"
    )


def _candidates(location: str, family: str | None, config_class: str | None) -> list[Layout]:
    """The layouts of the family that is named, by the user or by the configuration; all if none is."""
    if family is not None:
        get_family(family)
        return [layout for layout in LAYOUTS.values() if layout.family == family]
    if config_class is None:
        return list(LAYOUTS.values())
    families = {layout.family for layout in LAYOUTS.values() if layout.config_class == config_class}
    if not families:
        known = ", ".join(sorted({layout.config_class for layout in LAYOUTS.values() if layout.config_class}))
        raise ArtifactError(
            f"{location}: its configuration is of {config_class}; this version reads {known}. "
            "If the weights are of a known family all the same, name it with --family."
        )
    return [layout for layout in LAYOUTS.values() if layout.family in families]


def twins(layout: Layout) -> tuple[str, ...]:
    """Other families whose checkpoints have the very names of this layout: only a user or a configuration can tell."""
    return tuple(
        other.family
        for other in LAYOUTS.values()
        if other.family != layout.family and (other.places, other.layers) == (layout.places, layout.layers)
    )


def _what_is_read() -> str:
    return f"This version reads VAEs of the families {', '.join(FAMILIES)}, and its own artifacts."


def present_roles(shapes: Shapes, layout: Layout) -> tuple[Role, ...]:
    """Which of decoder and encoder a checkpoint holds. The 1x1 layers around the latent alone do not count."""
    if layout.by_blocks:
        return tuple(role for role in ROLES if any(name.startswith(f"{role}.") for name in shapes))
    return tuple(role for role in ROLES if any(name in shapes for name in _landmarks(layout, role)))


def _landmarks(layout: Layout, role: Role) -> list[str]:
    """Names that every variant has, whatever its operators: the norms, and the resamplers' layers on frames."""
    names = slots(blueprint(layout, role), layout)
    return [slot.foreign for slot in names if slot.ours.endswith((".gamma", ".spatial.weight"))]


def _best_share(shapes: Shapes, layout: Layout) -> tuple[float, int, str]:
    """The larger share of the landmarks found for one role, how many these are, and the first one that is missing."""
    if layout.by_blocks:
        share, missing = _share_of_blocks(shapes, layout)
        return share, 0, missing
    found: list[tuple[float, int, str]] = []
    for role in ROLES:
        landmarks = _landmarks(layout, role)
        missing = [name for name in landmarks if name not in shapes]
        there = len(landmarks) - len(missing)
        found.append((there / len(landmarks), there, missing[0] if missing else ""))
    return max(found, key=lambda entry: entry[:2])


def _share_of_blocks(shapes: Shapes, layout: Layout) -> tuple[float, str]:
    """The share of the blocks that are there, times that of the names that belong to one, in the worse of the roles
    that the checkpoint has; and what does not fit first. Layers inside the blocks may be of any operator."""
    worst = (1.0, "")
    roles: list[Role] = [role for role in ROLES if any(name.startswith(f"{role}.") for name in shapes)]
    for role in roles:
        names = [name for name in shapes if name.startswith(f"{role}.")]
        places = [f"{place}." for place in layout.places[role].values() if place != role]
        missing = [place for place in places if not any(name.startswith(place) for name in names)]
        known = (*places, f"{role}.conv_out.", f"{role}.norm_out.")
        strange = [name for name in names if not name.startswith(known) and not _CONDITION.search(name)]
        share = (1 - len(missing) / len(places)) * (1 - len(strange) / len(names))
        why = f"{missing[0]}*" if missing else f"other than {strange[0]}" if strange else ""
        is_shifted = any(name.endswith((".norm1.bias", ".timestep_scale_multiplier")) for name in names)
        if role == "decoder" and is_shifted != layout.is_shifted:
            share *= 0.5
            why = why or f"decoder.timestep_scale_multiplier{'' if layout.is_shifted else ' was expected'}"
        if share < worst[0]:
            worst = (share, why)
    return worst if roles else (0.0, f"{next(iter(layout.places['decoder'].values()))}.*")


def looks_like(shapes: Shapes) -> str | None:
    """What a checkpoint of another kind looks like; None if nothing known."""
    for what, fits in _OTHERS:
        if fits(shapes):
            return what
    return None


def _has(pattern: str) -> Callable[[Shapes], bool]:
    compiled = re.compile(pattern)
    return lambda shapes: any(compiled.search(name) for name in shapes)


def _all_of(*tests: Callable[[Shapes], bool]) -> Callable[[Shapes], bool]:
    return lambda shapes: all(test(shapes) for test in tests)


_CONDITION = re.compile(r"time_embedder|scale_shift_table|timestep_scale_multiplier")
_LTX = _has(r"per_channel_statistics\.|^latents_mean$|^decoder\.up_blocks\.\d\.res_blocks\.")
# First fit wins.
_OTHERS: tuple[tuple[str, Callable[[Shapes], bool]], ...] = (
    (
        "an all-in-one checkpoint (a VAE together with a diffusion model); "
        "save the tensors of its VAE to a file of their own",
        _all_of(_has(r"^model\.diffusion_model\."), _has(r"^(vae|first_stage_model)\.")),
    ),
    ("an adapter (LoRA), not a VAE", _has(r"\.lora_(A|B|up|down)\b|lora_unet")),
    ("a CogVideoX VAE", _has(r"^decoder\..*norm1\.conv_y\.")),
    (
        "a HunyuanVideo VAE",
        _all_of(
            _has(r"^decoder\.mid(_block\.resnets\.0|\.block_1)\.conv1\.conv\.weight$"),
            _has(r"^decoder\.mid(_block\.attentions\.0|\.block_1)\."),
        ),
    ),
    (
        "a VAE for images (Stable Diffusion, Flux)",
        _all_of(
            _has(r"^decoder\.mid(_block\.resnets\.0|\.block_1)\.norm1\.weight$"),
            lambda shapes: len(shapes.get("decoder.conv_in.weight", ())) == 4,
        ),
    ),
    ("a tiny autoencoder (TAEHV, LightTAE)", _all_of(_has(r"^decoder\.\d+\."), _has(r"^encoder\.\d+\."))),
    ("a diffusion transformer, not a VAE", _has(r"(^|\.)(transformer_)?blocks\.\d+\.(self_attn|attn1|cross_attn)\.")),
    ("a diffusion model, not a VAE", _has(r"^model\.diffusion_model\.|^(down|mid)_blocks?\..*attn2")),
)
