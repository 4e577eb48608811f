"""LTX-Video 0.9.0 to 0.9.8, LTX-2 and LTX-2.3."""

from flashvaed_cli.families.ltx.names import LTX_DIFFUSERS, LTX_ORIGINALS
from flashvaed_cli.families.ltx.spec import LTX_2_CLASS, LTX_VIDEO

FAMILIES = (*LTX_VIDEO, *LTX_2_CLASS)
LAYOUTS = (*LTX_ORIGINALS, *LTX_DIFFUSERS)
GROUPS = {
    "ltx-video": tuple(family.name for family in LTX_VIDEO),
    "ltx": tuple(family.name for family in FAMILIES),
}
