"""Tell from names and shapes which layout a checkpoint has, or what else it looks like."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from flashvaed_cli.artifact.layouts import Layout, Role, blueprint, slots
from flashvaed_cli.artifact.mismatch import Shape
from flashvaed_cli.artifact.wan_keys import LAYOUTS
from flashvaed_cli.errors import ArtifactError

Shapes = Mapping[str, Shape]

# Wrappers that tools put around every name of a VAE.
PREFIXES = ("module.", "_orig_mod.", "vae.", "first_stage_model.", "model.")
ROLES: tuple[Role, ...] = ("decoder", "encoder")


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


def recognise(shapes: Shapes, location: str = "checkpoint") -> Layout:
    """The layout whose names these are. Whether all are there is not checked here.

    Raises:
        ArtifactError: another model, or none that this version knows; names the candidates and what each lacks.
    """
    look = looks_like(shapes)
    if look is not None:
        raise ArtifactError(
            f"{location}: looks like {look}. This version reads Wan 2.1 VAEs "
            f"(layouts: {', '.join(LAYOUTS)}) and its own artifacts."
        )
    shares = {name: _best_share(shapes, layout) for name, layout in LAYOUTS.items()}
    best = max(shares, key=lambda name: shares[name][0])
    if shares[best][0] >= 0.5:
        return LAYOUTS[best]
    why = "\n".join(f"  {name}: no tensor named {missing}" for name, (_, missing) in shares.items())
    sample = ", ".join(list(shapes)[:4])
    raise ArtifactError(
        f"{location}: not a checkpoint that this version knows ({len(shapes)} tensors: {sample}, …). "
        f"The layouts tried:\n{why}\nGive a Wan 2.1 VAE or an artifact of flashvaed."
    )


def present_roles(shapes: Shapes, layout: Layout) -> tuple[Role, ...]:
    """Which of decoder and encoder a checkpoint holds. The 1x1 layers around the latent alone do not count."""
    return tuple(role for role in ROLES if any(name in shapes for name in _landmarks(layout, role)))


def _landmarks(layout: Layout, role: Role) -> list[str]:
    """Names that every variant has, whatever its operators: the norms."""
    return [slot.foreign for slot in slots(blueprint(layout, role), layout) if slot.ours.endswith(".gamma")]


def _best_share(shapes: Shapes, layout: Layout) -> tuple[float, str]:
    """The larger share of the landmarks found for one role, and the first one that is missing."""
    found: list[tuple[float, str]] = []
    for role in ROLES:
        landmarks = _landmarks(layout, role)
        missing = [name for name in landmarks if name not in shapes]
        found.append((1 - len(missing) / len(landmarks), missing[0] if missing else ""))
    return max(found, key=lambda pair: pair[0])


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


def _latent_width(width: int) -> Callable[[Shapes], bool]:
    return lambda shapes: any(
        shapes.get(f"{name}.weight", (0,))[:1] == (width,) for name in ("conv2", "post_quant_conv")
    )


# First fit wins.
_OTHERS: tuple[tuple[str, Callable[[Shapes], bool]], ...] = (
    (
        "an all-in-one checkpoint (a VAE together with a diffusion model); "
        "save the tensors of its VAE to a file of their own",
        _all_of(_has(r"^model\.diffusion_model\."), _has(r"^(vae|first_stage_model)\.")),
    ),
    ("an adapter (LoRA), not a VAE", _has(r"\.lora_(A|B|up|down)\b|lora_unet")),
    (
        "a Wan 2.2 VAE (48 latent channels)",
        lambda shapes: (
            "decoder.upsamples.0.upsamples.0.residual.2.weight" in shapes
            or _has(r"^decoder\.up_blocks\.\d\.upsampler\.resample\.1\.")(shapes)
            or (_latent_width(48)(shapes) and _has(r"^decoder\.(middle|mid_block)\.")(shapes))
        ),
    ),
    (
        "an LTX-Video VAE",
        _has(r"per_channel_statistics\.|^latents_mean$|^decoder\.up_blocks\.\d\.res_blocks\."),
    ),
    ("a CogVideoX VAE", _has(r"^decoder\..*norm1\.conv_y\.")),
    ("a HunyuanVideo VAE", _has(r"^decoder\.mid(_block\.resnets\.0|\.block_1)\.conv1\.conv\.weight$")),
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
