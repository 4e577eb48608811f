"""LTX-Video 0.9.0 to 0.9.8 and LTX-2."""

from flashvaed_cli.families.ltx.names import LTX_DIFFUSERS, LTX_ORIGINALS
from flashvaed_cli.families.ltx.spec import LTX_090, LTX_091, LTX_095, LTX_2

FAMILIES = (LTX_090, LTX_091, LTX_095, LTX_2)
LAYOUTS = (*LTX_ORIGINALS, *LTX_DIFFUSERS)
GROUPS = {
    "ltx-video": (LTX_090.name, LTX_091.name, LTX_095.name),
    "ltx": (LTX_090.name, LTX_091.name, LTX_095.name, LTX_2.name),
}
