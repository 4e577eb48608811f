"""Names of Qwen-Image's blocks in foreign checkpoints: those of Wan 2.1, the same network.

`qwen-original`: ComfyUI's file. `qwen-diffusers`: `AutoencoderKLQwenImage`.
"""

from __future__ import annotations

from dataclasses import replace

from flashvaed_cli.families.qwen_image.spec import NAME
from flashvaed_cli.families.wan21.names import ARGUMENTS, WAN_DIFFUSERS, WAN_ORIGINAL

QWEN_ORIGINAL = replace(WAN_ORIGINAL, name="qwen-original", family=NAME)
QWEN_DIFFUSERS = replace(
    WAN_DIFFUSERS, name="qwen-diffusers", family=NAME, config_class="AutoencoderKLQwenImage", arguments=ARGUMENTS
)
