"""The image VAEs of Stable Diffusion and its relatives (`AutoencoderKL`): SD 1 and 2, SDXL, SD 3, FLUX.1."""

from flashvaed_cli.families.stable_diffusion.names import KL_LAYOUTS
from flashvaed_cli.families.stable_diffusion.spec import FLUX_1, SD, SD_3, SDXL

FAMILIES = (SD, SDXL, SD_3, FLUX_1)
LAYOUTS = KL_LAYOUTS
