"""Stable Video Diffusion's VAE (`AutoencoderKLTemporalDecoder`)."""

from flashvaed_cli.families.stable_video_diffusion.names import SVD_DIFFUSERS, SVD_ORIGINAL
from flashvaed_cli.families.stable_video_diffusion.spec import STABLE_VIDEO_DIFFUSION

FAMILIES = (STABLE_VIDEO_DIFFUSION,)
LAYOUTS = (SVD_ORIGINAL, SVD_DIFFUSERS)
