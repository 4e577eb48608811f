"""Names of Wan 2.2's blocks in foreign checkpoints: as in Wan 2.1, but every stage has a name.

`wan2.2-original`: Wan's own `.pth` and ComfyUI's `.safetensors`. `wan2.2-diffusers`: `AutoencoderKLWan` with
`is_residual`. A bypass has weights in pruned decoders only, under the name of the shortcut without weights.

Reference: the key names of those files (facts only).
"""

from __future__ import annotations

from dataclasses import replace

from flashvaed_cli.families.layout import Layout
from flashvaed_cli.families.wan21.names import WAN_DIFFUSERS, WAN_ORIGINAL
from flashvaed_cli.families.wan22.spec import NAME

_RUNS = {"decoder": ("up", 3, "upsamples", "up_blocks", "upsampler")}
_RUNS["encoder"] = ("down", 2, "downsamples", "down_blocks", "downsampler")


def residual_places(role: str, base: Layout, *, is_original: bool, num_stages: int = 4) -> dict[str, str]:
    """The places of a role; outside the stages that change size, those of `base`."""
    stage, num_resblocks, run, diffusers_run, resampler = _RUNS[role]
    shared = base.places["decoder" if role == "decoder" else "encoder"]
    places = {address: place for address, place in shared.items() if not address.startswith(stage)}
    for i in range(num_stages):
        at = f"{role}.{run}.{i}" if is_original else f"{role}.{diffusers_run}.{i}"
        for j in range(num_resblocks):
            places[f"{stage}{i}.{j}"] = f"{at}.{run}.{j}" if is_original else f"{at}.resnets.{j}"
        places[f"{stage}{i}.{num_resblocks}"] = f"{at}.{run}.{num_resblocks}" if is_original else f"{at}.{resampler}"
        places[f"{stage}{i}.bypass"] = f"{at}.avg_shortcut"
    return places


def _layout(name: str, base: Layout, *, is_original: bool) -> Layout:
    places = {role: residual_places(role, base, is_original=is_original) for role in base.places}
    return replace(base, name=name, family=NAME, places=places)


WAN22_ORIGINAL = _layout("wan2.2-original", WAN_ORIGINAL, is_original=True)
WAN22_DIFFUSERS = _layout("wan2.2-diffusers", WAN_DIFFUSERS, is_original=False)
