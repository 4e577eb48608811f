"""SeedVR2's VAE at any width, by its arithmetic written out on a file's tensors.

No package on PyPI has the class, so this is written from facts about the original (ByteDance-Seed/SeedVR,
`models/video_vae_v3`): names, order of channels, padding, which frame of a cell a video begins with.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Tensors = dict[str, Tensor]
MULTIPLIERS = (1, 2, 4, 4)
TEMPORAL_STAGES = (1, 2)
"""The encoder's resamplers that halve frames; the decoder's double them in reverse, so its first two."""


def seedvr2_tensors(base_width: int = 8, latent_width: int = 16, seed: int = 0) -> Tensors:
    """Random weights under the names of `ema_vae.pth`, norms and biases too; few pixels are clamped."""
    generator, found = torch.Generator().manual_seed(seed), Tensors()

    def layer(name: str, *shape: int) -> None:
        found[f"{name}.weight"] = torch.randn(shape, generator=generator) * found_scale(shape)
        found[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)

    def norm(name: str, width: int) -> None:
        found[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=generator)
        found[f"{name}.bias"] = 0.2 * torch.randn(width, generator=generator)

    def resblock(name: str, before: int, after: int) -> None:
        norm(f"{name}.norm1", before)
        layer(f"{name}.conv1", after, before, 3, 3, 3)
        norm(f"{name}.norm2", after)
        layer(f"{name}.conv2", after, after, 3, 3, 3)
        if before != after:
            layer(f"{name}.conv_shortcut", after, before, 1, 1, 1)

    def middle(role: str, width: int) -> None:
        attention = f"{role}.mid_block.attentions.0"
        norm(f"{attention}.group_norm", width)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            layer(f"{attention}.{part}", width, width)
        for i in range(2):
            resblock(f"{role}.mid_block.resnets.{i}", width, width)

    widths = [base_width * multiple for multiple in MULTIPLIERS]
    layer("encoder.conv_in", widths[0], 3, 3, 3, 3)
    before = widths[0]
    for i, width in enumerate(widths):
        for j in range(2):
            resblock(f"encoder.down_blocks.{i}.resnets.{j}", width if j else before, width)
        if i < 3:
            layer(f"encoder.down_blocks.{i}.downsamplers.0.conv", width, width, 3 if i in TEMPORAL_STAGES else 1, 3, 3)
        before = width
    layer("decoder.conv_in", before, latent_width, 3, 3, 3)
    for role in ("encoder", "decoder"):
        middle(role, before)
    norm("encoder.conv_norm_out", before)
    layer("encoder.conv_out", 2 * latent_width, before, 3, 3, 3)
    for i, width in enumerate(reversed(widths)):
        for j in range(3):
            resblock(f"decoder.up_blocks.{i}.resnets.{j}", width if j else before, width)
        if i < 3:
            layer(f"decoder.up_blocks.{i}.upsamplers.0.upscale_conv", width * (8 if i < 2 else 4), width, 1, 1, 1)
            layer(f"decoder.up_blocks.{i}.upsamplers.0.conv", width, width, 3, 3, 3)
        before = width
    norm("decoder.conv_norm_out", before)
    layer("decoder.conv_out", 3, before, 3, 3, 3)
    found["decoder.conv_out.weight"] *= 0.3
    return found


def found_scale(shape: tuple[int, ...]) -> float:
    """The deviation of a layer's weights."""
    return (shape[1] * torch.Size(shape[2:]).numel()) ** -0.5


class Reference:
    """The coders on tensors of a file."""

    def __init__(self, tensors: Tensors, num_groups: int) -> None:
        self.tensors, self.num_groups = tensors, num_groups

    def encode(self, x: Tensor) -> Tensor:
        """Pixels to the mean of the raw latents."""
        x = self._causal("encoder.conv_in", x)
        for i in range(4):
            for j in range(2):
                x = self._resblock(f"encoder.down_blocks.{i}.resnets.{j}", x)
            if i < 3:
                x = F.pad(x, (0, 1, 0, 1))  # zeros right and below
                stride = (2, 2, 2) if i in TEMPORAL_STAGES else (1, 2, 2)
                x = self._causal(f"encoder.down_blocks.{i}.downsamplers.0.conv", x, stride=stride, margin=0)
        return self._end("encoder", self._middle("encoder", x)).chunk(2, dim=1)[0]

    def decode(self, z: Tensor) -> Tensor:
        """Raw latents to frames, not clamped."""
        x = self._middle("decoder", self._causal("decoder.conv_in", z))
        for i in range(4):
            for j in range(3):
                x = self._resblock(f"decoder.up_blocks.{i}.resnets.{j}", x)
            if i < 3:
                x = self._causal(f"decoder.up_blocks.{i}.upsamplers.0.conv", self._grown(i, x))
        return self._end("decoder", x)

    def _grown(self, index: int, x: Tensor) -> Tensor:
        """Channels by row, column and frame of a cell, then by channel; of the first cell its first frame is kept."""
        frames = 2 if index < 2 else 1
        name = f"decoder.up_blocks.{index}.upsamplers.0.upscale_conv"
        wide = F.conv3d(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])
        b, c, t, h, w = x.shape
        y = x.new_empty(b, c, frames * t, 2 * h, 2 * w)
        for i in range(2):
            for j in range(2):
                for k in range(frames):
                    start = ((2 * i + j) * frames + k) * c
                    y[:, :, k::frames, i::2, j::2] = wide[:, start : start + c]
        return y if frames == 1 else torch.cat([y[:, :, :1], y[:, :, 2:]], dim=2)

    def _causal(
        self, name: str, x: Tensor, *, stride: tuple[int, int, int] = (1, 1, 1), margin: int | None = None
    ) -> Tensor:
        """A clip's first frame is repeated before it."""
        weight = self.tensors[f"{name}.weight"]
        kt, kh, _ = weight.shape[2:]
        x = torch.cat([x[:, :, :1]] * (kt - 1) + [x], dim=2)
        around = kh // 2 if margin is None else margin
        return F.conv3d(x, weight, self.tensors[f"{name}.bias"], stride=stride, padding=(0, around, around))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        """GroupNorm of each frame."""
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        frames = [F.group_norm(frame, self.num_groups, weight, bias, 1e-6) for frame in x.unbind(2)]
        return torch.stack(frames, dim=2)

    def _resblock(self, name: str, x: Tensor) -> Tensor:
        h = self._causal(f"{name}.conv1", F.silu(self._norm(f"{name}.norm1", x)))
        h = self._causal(f"{name}.conv2", F.silu(self._norm(f"{name}.norm2", h)))
        return h + (self._causal(f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in self.tensors else x)

    def _middle(self, role: str, x: Tensor) -> Tensor:
        x = self._resblock(f"{role}.mid_block.resnets.0", x)
        place = f"{role}.mid_block.attentions.0"
        rows = self._norm(f"{place}.group_norm", x).permute(0, 2, 3, 4, 1).flatten(2, 3)  # [B, T, HW, C]
        q, k, v = (self._linear(f"{place}.{part}", rows) for part in ("to_q", "to_k", "to_v"))
        weights = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, dim=3)
        mixed = self._linear(f"{place}.to_out.0", weights @ v)
        x = x + mixed.unflatten(2, x.shape[3:]).permute(0, 4, 1, 2, 3)
        return self._resblock(f"{role}.mid_block.resnets.1", x)

    def _linear(self, name: str, rows: Tensor) -> Tensor:
        return F.linear(rows, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def _end(self, role: str, x: Tensor) -> Tensor:
        return self._causal(f"{role}.conv_out", F.silu(self._norm(f"{role}.conv_norm_out", x)))
