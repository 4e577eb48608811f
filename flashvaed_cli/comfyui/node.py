"""The loader node: one class for each exported decoder, so that several exports can coexist."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

NODE_PREFIX = "FlashVaedLoader_"


def node_mappings(decoder: Path) -> tuple[dict[str, type], dict[str, str]]:
    """What ComfyUI reads from a folder in `custom_nodes`: its node classes and their display names.

    Args:
        decoder: the artifact that the node loads.
    """

    class Loader(_Loader):
        path = decoder

    key = f"{NODE_PREFIX}{decoder.stem}"
    return {key: Loader}, {key: f"Load VAE: {decoder.stem} (flashvaed)"}


class _Loader:
    """A node without required inputs; `encoder` is a VAE that does the encoding."""

    path: ClassVar[Path]
    RETURN_TYPES = ("VAE",)
    FUNCTION = "load"
    CATEGORY = "loaders"
    DESCRIPTION = "A fast decoder for the same latents. It only decodes, unless a VAE is connected to `encoder`."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple[str, ...]]]:  # noqa: N802 - ComfyUI's name
        """No input is required; a stock VAE may lend its encoder."""
        return {"required": {}, "optional": {"encoder": ("VAE",)}}

    def load(self, encoder: Any = None) -> tuple[Any]:
        """The decoder as ComfyUI's VAE."""
        from flashvaed_cli.comfyui.vae import load_vae

        return (load_vae(self.path, encoder),)
