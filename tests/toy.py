"""Small seeded decoders, encoders and latents; a small VAE and small clips as files, for whole commands."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from flashvaed_cli.artifact.checkpoint import save_checkpoint
from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.decoders.modules.coder import Coder, Decoder, Encoder
from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec
from flashvaed_cli.decoders.spec.groups import Kept, channel_groups
from flashvaed_cli.families.wan21.spec import LATENT_MEAN, LATENT_STD, NAME, WAN21, wan_decoder_spec, wan_encoder_spec
from flashvaed_cli.families.wan22.spec import WAN22, wan22_decoder_spec
from flashvaed_cli.media.procedural import render_frames
from flashvaed_cli.media.writer import write_video
from flashvaed_cli.surgery.respec import converted_spec, narrowed_spec, with_time_rank

BASE_WIDTH = 4
LATENT_WIDTH = 4
NUM_FRAMES, HEIGHT, WIDTH = 5, 32, 40


def original_spec() -> DecoderSpec:
    """Wan at base width 4 with 4 latent channels: fewer unknowns in `conv_in` than a tiny clip has positions."""
    return wan_decoder_spec(BASE_WIDTH, LATENT_WIDTH)


def kept_of(spec: CoderSpec, stages: tuple[str, ...]) -> Kept:
    """All but every fourth channel (or run of channels, under GroupNorm) of all groups of some stages.

    With only two of four left, a norm meets vectors near zero and float32 no longer gives five digits.
    """
    return {
        tensor: tuple(i for i in range(group.width) if i // group.run % 4 != 1)
        for group in channel_groups(spec)
        if group.stage in stages
        for tensor in group.tensors
    }


def pruned_spec() -> DecoderSpec:
    """The original with three quarters of the channels of the shallow stages."""
    spec = original_spec()
    return narrowed_spec(spec, kept_of(spec, WAN21.shallow_stages))


def flash_spec() -> DecoderSpec:
    """Pruned and converted, as in the paper."""
    return converted_spec(pruned_spec(), WAN21.paper_operators)


DECODER_SPECS = {
    "original": original_spec(),
    "converted": converted_spec(original_spec(), WAN21.paper_operators),
    "pruned": pruned_spec(),
    "flash": flash_spec(),
    "low-rank": with_time_rank(flash_spec(), 0.5),
}


def wan22_spec() -> DecoderSpec:
    """Wan 2.2 at base width 4 with 4 latent channels."""
    return wan22_decoder_spec(BASE_WIDTH, LATENT_WIDTH)


def wan22_pruned_spec() -> DecoderSpec:
    """With three quarters of the channels of the shallow stages: two bypasses have a layer then."""
    return narrowed_spec(wan22_spec(), kept_of(wan22_spec(), WAN22.shallow_stages))


WAN22_SPECS = {
    "original": wan22_spec(),
    "pruned": wan22_pruned_spec(),
    "flash": converted_spec(wan22_pruned_spec(), WAN22.paper_operators),
}


def fill_(coder: Coder, seed: int = 0) -> None:
    """Draw every parameter, gains and biases too, so that a swap of two shows; few pixels are clamped."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in coder.named_parameters():
        if name.endswith("gamma"):
            parameter.uniform_(0.7, 1.3, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1, generator=generator)
        else:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    if isinstance(coder, Decoder):
        coder.get_parameter("stages.head.0.conv.weight").mul_(0.2)


def toy_decoder(spec: DecoderSpec | None = None, seed: int = 0) -> Decoder:
    """A decoder with random weights; the original if no spec is given."""
    decoder = Decoder(spec or original_spec()).eval().requires_grad_(False)
    fill_(decoder, seed)
    return decoder


def toy_encoder(seed: int = 0) -> Encoder:
    """An encoder with random weights, for `original_spec`."""
    encoder = Encoder(wan_encoder_spec(BASE_WIDTH, LATENT_WIDTH)).eval().requires_grad_(False)
    fill_(encoder, seed)
    return encoder


def toy_latents(num_latents: int = 3, height: int = 2, width: int = 3, *, seed: int = 0) -> Tensor:
    """Raw latents `[1, 4, T, H, W]` that are alike in neighbouring places, as real ones are."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1, LATENT_WIDTH, num_latents + 1, height + 1, width + 1, generator=generator)
    return F.avg_pool3d(noise, 2, stride=1) * 8**0.5


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
