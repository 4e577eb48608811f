"""HunyuanVideo, and the models that decode with its VAE (FramePack, SkyReels V1, Kandinsky 5)."""

from flashvaed_cli.families.hunyuanvideo.names import HUNYUAN_DIFFUSERS, HUNYUAN_ORIGINAL
from flashvaed_cli.families.hunyuanvideo.spec import HUNYUAN_VIDEO

FAMILIES = (HUNYUAN_VIDEO,)
LAYOUTS = (HUNYUAN_DIFFUSERS, HUNYUAN_ORIGINAL)
