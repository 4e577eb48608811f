"""HunyuanVideo 1.5."""

from flashvaed_cli.families.hunyuanvideo15.names import HUNYUAN_15_DIFFUSERS, HUNYUAN_15_ORIGINAL
from flashvaed_cli.families.hunyuanvideo15.spec import HUNYUAN_VIDEO_15

FAMILIES = (HUNYUAN_VIDEO_15,)
LAYOUTS = (HUNYUAN_15_DIFFUSERS, HUNYUAN_15_ORIGINAL)
