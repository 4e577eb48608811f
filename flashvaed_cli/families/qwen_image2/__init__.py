"""Qwen-Image 2."""

from flashvaed_cli.families.qwen_image2.names import QWEN2_DIFFUSERS, QWEN2_ORIGINAL
from flashvaed_cli.families.qwen_image2.spec import QWEN_IMAGE_2

FAMILIES = (QWEN_IMAGE_2,)
LAYOUTS = (QWEN2_DIFFUSERS, QWEN2_ORIGINAL)
