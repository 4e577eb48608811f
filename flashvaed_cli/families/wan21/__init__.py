"""Wan 2.1."""

from flashvaed_cli.families.wan21.names import WAN_DIFFUSERS, WAN_ORIGINAL
from flashvaed_cli.families.wan21.spec import WAN21

FAMILIES = (WAN21,)
LAYOUTS = (WAN_ORIGINAL, WAN_DIFFUSERS)
