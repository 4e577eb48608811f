"""LeanVAE, with 4, 16 or any other number of latent channels."""

from flashvaed_cli.families.leanvae.names import LEANVAE_ORIGINAL
from flashvaed_cli.families.leanvae.spec import LEANVAE

FAMILIES = (LEANVAE,)
LAYOUTS = (LEANVAE_ORIGINAL,)
