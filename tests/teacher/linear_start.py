"""A start for training: the residual streams of a Wan VAE as a linear autoencoder, solved in closed form.

Residual branches begin at zero, so encoder and decoder are linear chains up to their heads. Downsamplers
take principal components of 2x2 patches, then means and the principal differences of frame pairs (an
image's first frame skips the temporal layers: it has the means and no differences). Each decoder layer
is the ridge solution, frame by frame, for the encoder's features at the same resolution. A constant channel keeps the
norm before a head nearly linear, and SiLU(x) - SiLU(-x) = x makes the head itself linear.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from flashvaed_cli.decoders.modules.blocks import Attention, ConvBlock, Downsample, Head, ResBlock, Upsample
from flashvaed_cli.decoders.modules.coder import Coder, Decoder, Encoder
from flashvaed_cli.decoders.modules.operators import Conv, batch_as_frames, frames_as_batch
from flashvaed_cli.errors import SpecError

RIDGE_FRAC = 1e-4
BODY_CONSTANT, ENCODER_HEAD_CONSTANT, DECODER_HEAD_CONSTANT = 1.0, 4.0, 6.0
LOG_VARIANCE = -12.0
_MAX_ROWS = 120_000

Clips = Float[Tensor, "B C T H W"]


@torch.no_grad()
def start_linear(encoder: Encoder, decoder: Decoder, clips: Clips) -> None:
    """Set both coders' weights so that together they are about the best linear code of `clips`.

    Args:
        clips: training clips in [-1, 1] with 5, 9, … frames; a few dozen of 64x64 are enough.
    Raises:
        SpecError: the base width is below 8, too narrow for RGB with both signs and the constant.
    """
    width = encoder.spec.stages[0].blocks[0].out_width
    if width < 8:
        raise SpecError(f"a linear start needs a base width of at least 8, not {width}: choose a wider one")
    for coder in (encoder, decoder):
        _silence_branches(coder)
    features = _fit_encoder(encoder, clips)
    latents = encoder(clips).chunk(2, dim=1)[0]
    _fit_decoder(decoder, latents, features, clips)


def _silence_branches(coder: Coder) -> None:
    """Zero what residual branches add; shortcuts embed, the last channel (the constant) staying last."""
    for _, block in coder.blocks():
        if isinstance(block, ResBlock):
            nn.init.zeros_(block.conv2.weight)
            block.conv1.weight[:, :, :-1] = 0.0  # what images teach then holds for clips
            if block.shortcut is not None:
                weight = block.shortcut.weight
                weight.zero_()
                kept = min(weight.shape) - 1
                weight[:kept, :kept] = torch.eye(kept)
                weight[-1, -1] = 1.0
        elif isinstance(block, Attention):
            nn.init.zeros_(block.proj.weight)
            nn.init.zeros_(block.proj.bias)


def _fit_encoder(encoder: Encoder, clips: Clips) -> list[tuple[Clips, Clips]]:
    """Per downsampler, its features before and after the temporal layer (paths only), finest first."""
    conv_in = _conv_at(encoder, "conv_in.0")
    conv_in.weight[:3] = 0.0
    conv_in.weight[:3, :, -1, 1, 1] = torch.eye(3)
    conv_in.bias.zero_()
    conv_in.weight[-1] = 0.0
    conv_in.bias[-1] = BODY_CONSTANT
    x, path, kept = conv_in(clips), 3, []
    downsamplers = [b for _, b in encoder.blocks() if isinstance(b, Downsample)]
    for _, block in list(encoder.blocks())[1:]:
        if isinstance(block, Downsample):
            last = block is downsamplers[-1]
            path, before = _fit_downsample(block, x, path, signed=last)
            x = block(x)
            kept.append((before, x[:, :path]))
        elif isinstance(block, Head):
            _fit_encoder_head(block, x, path)
            break
        else:
            x = block(x)
    quant = _conv_at(encoder, "quant.0")
    quant.weight.copy_(torch.eye(quant.weight.shape[0]))
    return kept


def _conv_at(coder: Coder, address: str) -> Conv:
    block = coder.at(address)
    assert isinstance(block, ConvBlock)
    return block.conv


def _fit_downsample(block: Downsample, x: Clips, path: int, *, signed: bool) -> tuple[int, Clips]:
    """Set a downsampler; returns the number of path channels after it and the features before `temporal`."""
    width = block.spatial.weight.shape[0]
    room = (width - 1) // 2 if signed else width - 1
    num_means = min(4 * path, room if block.temporal is None else round(room * 0.75))
    patches = F.unfold(frames_as_batch(x[:, :path]), 2, stride=2).transpose(1, 2).flatten(0, 1)  # [N, C*4]
    weight, bias = block.spatial.weight, block.spatial.bias
    weight.zero_()
    bias.zero_()
    weight[:num_means, :path, :2, :2] = 0.5 * _components(patches, num_means).unflatten(1, (path, 2, 2))
    bias[-1] = ENCODER_HEAD_CONSTANT if signed else BODY_CONSTANT
    frames = F.conv2d(F.pad(frames_as_batch(x), (0, 1, 0, 1)), weight, bias, stride=2)
    before = batch_as_frames(frames, x)[:, :num_means].clone()
    total = num_means
    if block.temporal is not None:
        total = num_means + min(num_means, room - num_means)
        mix = block.temporal.weight[:, :, :, 0, 0]  # [O, C, 3]
        mix.zero_()
        block.temporal.bias.zero_()
        mix[:num_means, :num_means, 1:] = 0.5 * torch.eye(num_means)[:, :, None]
        differences = (before[:, :, 2::2] - before[:, :, 1::2]).transpose(0, 1).flatten(1).T
        principal = 0.5 * _components(differences, total - num_means)
        mix[num_means:total, :num_means, 2], mix[num_means:total, :num_means, 1] = principal, -principal
        mix[-1, -1, 2] = 1.0
    if signed:  # the second half of the channels is the first with the other sign
        weight[room : room + num_means] = -weight[:num_means]
        if block.temporal is not None:
            block.temporal.weight[room : room + total] = -block.temporal.weight[:total]
    return total, before


def _fit_encoder_head(head: Head, x: Clips, path: int) -> None:
    """Principal components of the path, half whitened; a small constant variance."""
    width = x.shape[1]
    room = (width - 1) // 2
    num_latents = min(head.conv.weight.shape[0] // 2, path)
    rows = x[:, :path].transpose(0, 1).flatten(1).T
    components = _components(rows, num_latents)
    mean, std = (rows @ components.T).mean(0), (rows @ components.T).std(0)
    std = (std * std[0]).sqrt()  # full whitening would make fine detail too sensitive to every step
    head.conv.weight.zero_()
    head.conv.bias.zero_()
    head.conv.weight[:num_latents, :path, -1, 1, 1] = components / std[:, None]
    head.conv.weight[:num_latents, room : room + path, -1, 1, 1] = -components / std[:, None]
    head.conv.bias[:num_latents] = -mean / std
    head.conv.bias[head.conv.bias.shape[0] // 2 :] = LOG_VARIANCE
    _fit_norm(head, x)


def _fit_norm(head: Head, x: Clips) -> None:
    """Make the norm about the identity on all channels but the constant, which comes out as 1."""
    typical = x.square().sum(1).mean().sqrt()
    gamma = head.get_submodule("norm").get_parameter("gamma")
    gamma.fill_(float(typical) / x.shape[1] ** 0.5)
    gamma[-1] = float(typical / x[:, -1].mean()) / x.shape[1] ** 0.5


def _fit_decoder(decoder: Decoder, latents: Clips, features: list[tuple[Clips, Clips]], clips: Clips) -> None:
    """Layer after layer: the ridge solution for the encoder's features at that resolution."""
    quant = _conv_at(decoder, "post_quant.0")
    quant.weight.copy_(torch.eye(quant.weight.shape[0]))
    targets = list(reversed(features))
    conv_in = _conv_at(decoder, "conv_in.0")
    _solve(conv_in, _patches(latents, 3), targets[0][1])
    conv_in.bias[-1] = BODY_CONSTANT
    x, path, level = conv_in(latents), targets[0][1].shape[1], 0
    for _, block in list(decoder.blocks())[2:]:
        if isinstance(block, Upsample):
            before = targets[level][0]
            if block.temporal is not None:
                _fit_temporal(block, x, path, before)
                path = before.shape[1]
                x = block.double_frames(x)
            level += 1
            finest = level == len(targets)
            target = torch.cat([clips, -clips], dim=1) if finest else targets[level][1]
            frames = F.interpolate(frames_as_batch(x), scale_factor=2, mode="nearest")
            x = batch_as_frames(frames, x)
            _solve(block.spatial, _patches(x[:, :path], 3), target)
            block.spatial.bias[-1] = DECODER_HEAD_CONSTANT if finest else BODY_CONSTANT
            x, path = block.spatial(x), target.shape[1]
        elif isinstance(block, Head):
            block.conv.weight.zero_()
            block.conv.bias.zero_()
            block.conv.weight[:, :3, -1, 1, 1] = torch.eye(3)
            block.conv.weight[:, 3:6, -1, 1, 1] = -torch.eye(3)
            _fit_norm(block, x)
        else:
            if isinstance(block, ResBlock) and x[:, -1].mean() > 2 * BODY_CONSTANT:
                _temper(block, x)
            x = block(x)


def _temper(block: ResBlock, x: Clips) -> None:
    """Let a branch see the path at its own scale although the constant dominates the norm."""
    typical = float(x.square().sum(1).mean().sqrt())
    gamma = block.norm1.get_parameter("gamma")
    gamma.fill_(typical / x.shape[1] ** 0.5)
    gamma[-1] = float(typical / x[:, -1].mean()) / x.shape[1] ** 0.5


def _fit_temporal(block: Upsample, x: Clips, path: int, target: Clips) -> None:
    """Frames after the first, from features to frame pairs (first half of the outputs: the earlier frame)."""
    assert block.temporal is not None
    temporal, width = block.temporal, x.shape[1]
    pairs = torch.cat([target[:, :, 1::2], target[:, :, 2::2]], dim=1)
    rows = [*range(target.shape[1]), *range(width, width + target.shape[1])]
    _solve(temporal, x[:, :path, 1:], pairs, rows)
    temporal.bias[width - 1], temporal.bias[-1] = BODY_CONSTANT, BODY_CONSTANT


def _patches(x: Clips, side: int) -> Clips:
    """`[B, C*side*side, T, H, W]`: what a convolution sees at each position of a frame."""
    frames = frames_as_batch(x)
    patches = F.unfold(frames, side, padding=side // 2).unflatten(2, frames.shape[2:])
    return batch_as_frames(patches, x)


def _solve(conv: nn.Module, patches: Clips, target: Clips, rows: list[int] | None = None) -> None:
    """Set rows of a convolution (default: the first) by ridge least squares on the current frame; zero all else.

    The taps on earlier frames stay zero: in short clips they see mostly the padding, and what they learn
    from it fails from the fourth latent frame on.
    """
    stride = max(1, patches[:, 0].numel() // _MAX_ROWS)
    inputs = patches.transpose(0, 1).flatten(1).T[::stride].double()  # [N, K]
    inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
    outputs = target.transpose(0, 1).flatten(1).T[::stride].double()  # [N, O]
    gram = inputs.T @ inputs
    gram.diagonal().add_(RIDGE_FRAC * gram.diagonal().mean())
    solution = torch.linalg.solve(gram, inputs.T @ outputs).T.float()  # [O, K + 1]
    weight, bias = conv.get_parameter("weight"), conv.get_parameter("bias")
    weight.zero_()
    bias.zero_()
    taps = weight if weight.ndim == 4 else weight[:, :, -1]  # [O, C, kh, kw]
    rows = list(range(len(solution))) if rows is None else rows
    num_inputs = patches.shape[1] // taps[0, 0].numel()
    taps[rows, :num_inputs] = solution[:, :-1].unflatten(1, (num_inputs, *taps.shape[2:]))
    bias[rows] = solution[:, -1]


def _components(rows: Float[Tensor, "N C"], count: int) -> Float[Tensor, "K C"]:
    """The leading principal directions through the origin (a mean is content here), as rows."""
    gram = (rows.double().T @ rows.double()) / rows.shape[0]
    return torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :count].T.float()
