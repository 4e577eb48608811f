"""FLUX.2's image VAE (`AutoencoderKLFlux2`)."""

from flashvaed_cli.families.flux2.names import FLUX_2_LAYOUTS
from flashvaed_cli.families.flux2.spec import FLUX_2

FAMILIES = (FLUX_2,)
LAYOUTS = FLUX_2_LAYOUTS
