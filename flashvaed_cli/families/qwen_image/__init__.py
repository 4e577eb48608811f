"""Qwen-Image."""

from flashvaed_cli.families.qwen_image.names import QWEN_DIFFUSERS, QWEN_ORIGINAL
from flashvaed_cli.families.qwen_image.spec import QWEN_IMAGE

FAMILIES = (QWEN_IMAGE,)
LAYOUTS = (QWEN_ORIGINAL, QWEN_DIFFUSERS)
