"""All foreign layouts that this version reads, by name. A new family adds its own here.

Where two have the same keys, the first is taken unless the user or a configuration names the other's family.
"""

from __future__ import annotations

from flashvaed_cli.artifact.layouts import Layout
from flashvaed_cli.artifact.ltx_keys import LTX_DIFFUSERS, LTX_ORIGINALS
from flashvaed_cli.artifact.wan22_keys import QWEN2_DIFFUSERS, QWEN2_ORIGINAL, WAN22_DIFFUSERS, WAN22_ORIGINAL
from flashvaed_cli.artifact.wan_keys import QWEN_DIFFUSERS, QWEN_ORIGINAL, WAN_DIFFUSERS, WAN_ORIGINAL

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        WAN_ORIGINAL,
        WAN_DIFFUSERS,
        WAN22_ORIGINAL,
        WAN22_DIFFUSERS,
        QWEN_ORIGINAL,
        QWEN_DIFFUSERS,
        QWEN2_DIFFUSERS,
        QWEN2_ORIGINAL,
        *LTX_ORIGINALS,
        *LTX_DIFFUSERS,
    )
}


def original_layout(family: str) -> Layout:
    """The layout of a family's own files."""
    return next(layout for layout in LAYOUTS.values() if layout.family == family and layout.config_class is None)
