"""A small seeded VAE and small clips, as files: what whole commands are tested on."""

from __future__ import annotations

from pathlib import Path

import torch

from flashvaed_cli.artifact.checkpoint import save_checkpoint
from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.decoders.coder import Decoder, Encoder
from flashvaed_cli.decoders.wan import LATENT_MEAN, LATENT_STD, NAME, wan_decoder_spec, wan_encoder_spec
from flashvaed_cli.media.procedural import render_frames
from flashvaed_cli.media.writer import write_video

BASE_WIDTH = 4
NUM_FRAMES, HEIGHT, WIDTH = 5, 32, 40


def toy_vae(seed: int = 0) -> tuple[Decoder, Encoder]:
    """Wan at base width 4 with random weights, biases too; the head is toned down so that few pixels are clamped."""
    torch.manual_seed(seed)
    decoder, encoder = Decoder(wan_decoder_spec(BASE_WIDTH)), Encoder(wan_encoder_spec(BASE_WIDTH))
    for coder in (decoder, encoder):
        coder.eval().requires_grad_(False)
        for name, parameter in coder.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    decoder.get_parameter("stages.head.0.conv.weight").mul_(0.2)
    return decoder, encoder


def write_toy_vae(path: Path, *, seed: int = 0) -> Path:
    """The toy VAE as an artifact: an original, from which pipelines start."""
    decoder, encoder = toy_vae(seed)
    header = ArtifactHeader(kind="vae", family=NAME, latent_mean=LATENT_MEAN, latent_std=LATENT_STD)
    save_checkpoint(path, header, decoder=decoder, encoder=encoder)
    return path


def write_toy_clip(path: Path, num_frames: int = NUM_FRAMES, height: int = HEIGHT, width: int = WIDTH) -> Path:
    """The first frames of the procedural shot."""
    frames = render_frames(num_frames, height, width)
    write_video(path, (frame.unsqueeze(1) for frame in frames), fps=24)
    return path
