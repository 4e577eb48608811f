"""Wan 2.2 (TI2V-5B)."""

from flashvaed_cli.families.wan22.names import WAN22_DIFFUSERS, WAN22_ORIGINAL
from flashvaed_cli.families.wan22.spec import WAN22

FAMILIES = (WAN22,)
LAYOUTS = (WAN22_ORIGINAL, WAN22_DIFFUSERS)
