"""flashvaed: turn the decoder of a video VAE into a fast drop-in decoder for the same latents.

    import flashvaed_cli as flashvaed

    vae = flashvaed.load("flash.safetensors", device="cuda", dtype="bfloat16")
    video = vae.decode(latents, scale="normalized")   # [B, 3, F, H, W] in [-1, 1]
    flashvaed.accelerate(pipe, "flash.safetensors")   # a diffusers pipeline: pipe.vae decodes with it from now on

The names of `__all__` are the public API. They are imported at first use, so that importing the package stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashvaed_cli.api.acceleration import Acceleration, accelerate
    from flashvaed_cli.api.vae import Vae, VaeStream, load

__version__ = "0.3.0"
__all__ = ["Acceleration", "Vae", "VaeStream", "accelerate", "load"]

_HOMES = {
    "Acceleration": "flashvaed_cli.api.acceleration",
    "VaeStream": "flashvaed_cli.api.vae",
    "Vae": "flashvaed_cli.api.vae",
    "accelerate": "flashvaed_cli.api.acceleration",
    "load": "flashvaed_cli.api.vae",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
