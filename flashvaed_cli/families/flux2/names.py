"""Names of the blocks of FLUX.2's VAE in foreign checkpoints.

`flux.2-original`: the `ae` of Black Forest Labs, with the names of Stable Diffusion's single files, except that the 1x1
layers around the latent are inside the coders. `flux.2-diffusers`: `AutoencoderKLFlux2`. Both hold a batch norm's
running mean and variance, the statistics of the latents.

Reference: the key names of those files (facts only).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from flashvaed_cli.families.flux2.spec import BATCH_NORM_EPS, FLUX_2, LATENT_WIDTH
from flashvaed_cli.families.layout import Layout, Role
from flashvaed_cli.families.stable_diffusion.names import ARGUMENTS, deny_axes, kl_layout

_BUFFERS = "bn."
_COUNTER = "bn.num_batches_tracked"
_NESTED = {"decoder.post_quant_conv": "post_quant_conv", "encoder.quant_conv": "quant_conv"}
_FACTORS = {"scaling_factor", "shift_factor", "latents_mean", "latents_std"}
_OWN_ARGUMENTS = ("decoder_block_out_channels", "batch_norm_eps", "patch_size")


def _flat_names(names: Iterable[str]) -> dict[str, str]:
    """The names that other variants' single files have, to the names given."""
    flat: dict[str, str] = {}
    for name in names:
        nested = next((start for start in _NESTED if name.startswith(f"{start}.")), None)
        flat[name if nested is None else _NESTED[nested] + name.removeprefix(nested)] = name
    return flat


def _layout(kind: str) -> Layout:
    base = kl_layout(FLUX_2, kind)
    assert base.prepare is not None and base.finish is not None and base.implied is not None
    prepare, finish, implied = base.prepare, base.finish, base.implied
    is_diffusers = kind == "diffusers"

    def prepared(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(_BUFFERS)}
        return prepare(own, config)

    def finished(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**finish(tensors), _COUNTER: torch.tensor(0)}

    def said_by_names(names: Iterable[str]) -> dict[str, Any]:
        return implied(_flat_names(names))

    places: dict[Role, dict[str, str]] = {role: dict(found) for role, found in base.places.items()}
    if not is_diffusers:
        places["decoder"]["post_quant.0"], places["encoder"]["quant.0"] = _NESTED
    return Layout(
        name=base.name,
        family=base.family,
        places=places,
        layers=base.layers,
        config_class="AutoencoderKLFlux2" if is_diffusers else None,
        gain=base.gain,
        prepare=prepared,
        implied=said_by_names,
        finish=finished,
        statistics=("bn.running_mean", "bn.running_var"),
        variance_eps=BATCH_NORM_EPS,
        denied=_denial(),
        arguments=(*(one for one in ARGUMENTS if one not in _FACTORS), *_OWN_ARGUMENTS) if is_diffusers else (),
    )


def _denial() -> Callable[[Mapping[str, tuple[int, ...]], Mapping[str, Any]], str | None]:
    """What shapes say against it: the other variants have its names, but no batch norm
    and another number of latent channels."""

    def deny(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> str | None:
        if (fault := deny_axes(4, shapes, config)) is not None:
            return fault
        if any(name.startswith(_BUFFERS) for name in shapes):
            return None
        entry, end = shapes.get("decoder.conv_in.weight", ()), shapes.get("encoder.conv_out.weight", ())
        found = entry[1] if len(entry) == 4 else end[0] // 2 if len(end) == 4 else None
        if found is None or found == LATENT_WIDTH:
            return None
        return f"it has {found} latent channels, not {LATENT_WIDTH}"

    return deny


FLUX_2_LAYOUTS = tuple(_layout(kind) for kind in ("original", "diffusers"))
