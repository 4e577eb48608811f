"""A synthetic clip: for tests, and as one more source for training the embedded VAE.

One continuous shot of what a video VAE has to handle: clouds and stone with a natural 1/f spectrum,
smooth gradients, fine repeating texture in perspective, sharp edges that rotate, zoom and fly, water,
large and small text, film grain. Everything is determined by the seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

_SEED = 7
_HORIZON = 0.52
_GRAIN_STD = 0.008
_OVERSAMPLING = 2
_TICKER_TEXT = "FLASHVAED  ~  procedural test clip  ~  0123456789  ~  The quick brown fox jumps over the lazy dog  ~  "
_Color = tuple[float, float, float]
_Plane = Float[Tensor, "H W"]
_Picture = Float[Tensor, "3 H W"]


def render_frames(num_frames: int, height: int, width: int, seed: int = _SEED) -> Iterator[Float[Tensor, "C H W"]]:
    """Render the shot frame by frame.

    Args:
        num_frames: at 24 per second; the motion continues for any length.
        seed: determines textures, ridges, confetti and grain.
    Returns:
        Frames of RGB in [-1, 1], float32.
    """
    if min(num_frames, height, width) < 1:
        raise ValueError(f"{num_frames} frames of {height}x{width} is not a clip")
    scene = _Scene(height, width, seed)
    for index in range(num_frames):
        yield scene.frame(index).mul(2.0).sub(1.0)


class _Scene:
    """Textures made once, and the layers of a frame painted back to front. Heights are in [0, 1]."""

    def __init__(self, height: int, width: int, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.height, self.width = height, width
        self.pixel = 1.0 / (_OVERSAMPLING * height)  # the width of an edge
        rows = (torch.arange(_OVERSAMPLING * height) + 0.5) / (_OVERSAMPLING * height)
        columns = (torch.arange(_OVERSAMPLING * width) + 0.5) / (_OVERSAMPLING * height)
        self._grid = torch.meshgrid(rows, columns - columns[-1] / 2, indexing="ij")
        self.clouds = self._noise(512, 1.5)
        self.rock = self._noise(512, 1.15)
        self.detail = self._noise(512, 0.7)
        self.ridges = [self._ridge(power) for power in (1.1, 1.3)]
        self.confetti = torch.rand(26, 8, generator=self._generator)
        self.ticker = _text_mask(_TICKER_TEXT, 64)
        self.sign = _text_mask("VAE", 96)

    def frame(self, index: int) -> _Picture:
        """One frame in [0, 1]."""
        time = index / 24
        zoom, angle = 1 + 0.10 * math.sin(0.9 * time), 0.035 * math.sin(1.7 * time)
        y, x = self._grid[0] - 0.5, self._grid[1]
        v = 0.5 + (y * math.cos(angle) - x * math.sin(angle)) / zoom
        u = (x * math.cos(angle) + y * math.sin(angle)) / zoom
        picture = self._sky(u, v, time)
        picture = self._mountains(picture, u, v, time)
        picture = self._ground(picture, u, v, time)
        picture = self._sign_post(picture, u, v, time)
        picture = self._pinwheel(picture, u, v, time)
        picture = self._ball(picture, u, v, time)
        picture = self._paper(picture, time)
        picture = self._caption(picture, time, index)
        picture = functional.avg_pool2d(picture, _OVERSAMPLING)
        grain = torch.randn(3, self.height, self.width, generator=self._generator)
        return (picture + _GRAIN_STD * grain).clamp(0, 1)

    def _noise(self, side: int, power: float) -> _Plane:
        """Periodic noise of amplitude spectrum 1 / f**power, mean 0.5, standard deviation 0.2."""
        frequency = torch.fft.fftfreq(side, 1 / side)
        radius = torch.hypot(frequency[:, None], frequency[None, :])
        radius[0, 0] = 1.0
        white = torch.fft.fft2(torch.randn(side, side, generator=self._generator))
        field = torch.fft.ifft2(white / radius**power).real
        field = field - field.mean()
        return 0.5 + 0.2 * field / field.std()

    def _ridge(self, power: float) -> Float[Tensor, " N"]:
        white = torch.fft.rfft(torch.randn(1024, generator=self._generator))
        frequency = torch.arange(white.shape[0]).clamp(min=3).float()
        line = torch.fft.irfft(white / frequency**power)
        return (line - line.mean()) / line.std()

    def _sky(self, u: _Plane, v: _Plane, time: float) -> _Picture:
        depth = (v / _HORIZON).clamp(0, 1)
        picture = _blend(_solid((0.10, 0.27, 0.62), v), (0.98, 0.76, 0.52), depth**1.6)
        distance = torch.hypot(u + 0.22, v - 0.20)
        picture = picture + _rgb((1.0, 0.75, 0.4)) * 0.55 * torch.exp(-distance / 0.11)
        picture = _blend(picture, (1.0, 0.97, 0.85), self._inside(distance - 0.055))
        spread = 1 / (1.15 - depth)  # clouds crowd towards the horizon
        low = _sample(self.clouds, 0.22 * u * spread + 0.03 * time, 0.45 * spread + 0.01 * time)
        puffs = _sample(self.clouds, 0.9 * u * spread + 0.05 * time, 1.3 * spread)
        cover = _smoothstep(0.47, 0.72, 0.7 * low + 0.3 * puffs)
        shade = (0.55 + 0.9 * (puffs - 0.25)).clamp(0.45, 1.0)
        return _blend(picture, _rgb((1.0, 0.96, 0.93)) * shade, 0.9 * cover)

    def _mountains(self, picture: _Picture, u: _Plane, v: _Plane, time: float) -> _Picture:
        far = _HORIZON - 0.13 - 0.05 * _sample_line(self.ridges[0], 0.16 * u + 0.012 * time)
        stone = _sample(self.rock, 0.8 * u + 0.4 * v + 0.01 * time, 0.7 * v)
        slope = _sample(self.detail, 0.5 * u + 0.01 * time, 0.25 * v) - stone
        snow = _smoothstep(0.075, 0.045, v - far + 0.22 * (stone - 0.5))
        color = _blend(_rgb((0.27, 0.33, 0.50)) * (0.8 + 0.9 * slope), (0.93, 0.94, 1.0), snow)
        haze = ((v - far) / 0.2).clamp(0, 0.55)
        picture = _blend(picture, _blend(color, (0.80, 0.66, 0.62), haze), self._inside(far - v))
        near = _HORIZON - 0.035 - 0.03 * _sample_line(self.ridges[1], 0.25 * u + 0.04 * time)
        shift = 0.16 * time
        leaves = _sample(self.detail, 2.1 * u + 2.1 * shift, 3.0 * v)
        meadow = _sample(self.rock, 0.7 * u + 0.7 * shift, 1.8 * v)
        color = _blend(_solid((0.08, 0.20, 0.07), v), (0.55, 0.62, 0.18), (1.5 * leaves + meadow - 0.75).clamp(0, 1))
        return _blend(picture, color, self._inside(near - v + 0.012 * (leaves - 0.5)))

    def _ground(self, picture: _Picture, u: _Plane, v: _Plane, time: float) -> _Picture:
        below = (v - _HORIZON).clamp(min=0.004)
        depth = 0.16 / below
        across, along = u * depth / 0.16 * 0.32, depth + 0.9 * time
        fade = (below / 0.08).clamp(0, 1)  # fine tiles dissolve before they alias
        tile = ((2.5 * across).floor() + (2.5 * along).floor()) % 2
        joint = torch.minimum(_to_integer(2.5 * across), _to_integer(2.5 * along))
        stone = _sample(self.rock, 0.5 * across, 0.5 * along) + 0.4 * (
            _sample(self.detail, 0.7 * across, 0.7 * along) - 0.5
        )
        paving = _blend(_solid((0.62, 0.36, 0.26), v), (0.86, 0.80, 0.70), fade * tile + (1 - fade) * 0.5)
        paving = paving * (0.55 + 0.9 * stone) * (1 - 0.6 * fade * _smoothstep(0.05, 0.02, joint))
        waves = _sample(self.clouds, 1.2 * across + 0.2 * time, 2.4 * along) - 0.5
        waves = waves + 0.5 * (_sample(self.rock, 1.9 * across - 0.3 * time, 3.1 * along) - 0.5)
        mirrored = self._sky(u + 0.2 * waves * fade, (2 * _HORIZON - v + 0.5 * waves * fade).clamp(0, 1), time)
        water = mirrored * _rgb((0.45, 0.68, 0.80)) + (0.9 * (waves - 0.16)).clamp(min=0)
        bank = across - 0.10 - 0.12 * torch.sin(1.3 * along)
        ground = _blend(paving, water, _smoothstep(0.0, 0.02, bank))
        ground = _blend(ground, (0.93, 0.90, 0.78), _smoothstep(0.03, 0.01, bank.abs()))
        return _blend(picture, ground, self._inside(_HORIZON - v))

    def _sign_post(self, picture: _Picture, u: _Plane, v: _Plane, time: float) -> _Picture:
        """A board that swings and zooms, with letters, on a pole."""
        scale = 0.125 * (1 + 0.25 * math.sin(2.3 * time))
        angle = 0.25 * math.sin(3.1 * time)
        dx, dy = u + 0.30, v - 0.50
        picture = _blend(
            picture, (0.16, 0.12, 0.10), self._inside(torch.maximum(dx.abs() - 0.008, (v - 0.66).abs() - 0.18))
        )
        right = (dx * math.cos(angle) + dy * math.sin(angle)) / scale
        down = (dy * math.cos(angle) - dx * math.sin(angle)) / scale
        edge = torch.maximum(right.abs() - 1.25, down.abs() - 0.75) * scale
        picture = _blend(picture, (0.97, 0.96, 0.90), self._inside(edge))
        board = _blend(_solid((0.75, 0.06, 0.12), v), (0.95, 0.35, 0.10), (0.5 + 0.4 * right).clamp(0, 1))
        picture = _blend(picture, board, self._inside(edge + 0.08 * scale))
        rows, columns = self.sign.shape
        letters = _sample(self.sign, 0.5 + right / 2.1, 0.5 + down * columns / rows / 2.1, wrap=False)
        return _blend(picture, (1.0, 1.0, 1.0), letters * self._inside(edge + 0.08 * scale))

    def _pinwheel(self, picture: _Picture, u: _Plane, v: _Plane, time: float) -> _Picture:
        """Twelve sharp blades that spin around a rose with a smooth rim."""
        dx, dy = u - 0.31, v - 0.30
        radius, angle = torch.hypot(dx, dy), torch.atan2(dy, dx) + 2.4 * time
        star = 0.135 + 0.035 * torch.cos(6 * angle)
        blade = (angle + 6 * radius) / (2 * math.pi) * 12
        parity = 0.5 + 0.5 * (math.pi * radius * blade.mul(math.pi).sin() / 12 / self.pixel).clamp(-1, 1)
        hue = torch.stack([0.5 + 0.5 * torch.cos(angle + phase) for phase in (0.0, 2.1, 4.2)])
        picture = _blend(picture, _blend(hue, (0.05, 0.06, 0.20), parity), self._inside(radius - star))
        picture = _blend(picture, (1.0, 0.85, 0.2), self._inside(radius - 0.03))
        return _blend(picture, (0.1, 0.1, 0.1), self._inside((radius - 0.03).abs() - 0.003))

    def _ball(self, picture: _Picture, u: _Plane, v: _Plane, time: float) -> _Picture:
        """A shaded ball with stripes that bounces over the paving, and its shadow."""
        center_u, hop = -0.12 + 0.26 * math.sin(1.5 * time), 0.20 * abs(math.cos(4.2 * time))
        center_v, size = 0.74 - hop, 0.095
        shadow = torch.hypot((u - center_u) / 1.0, (v - 0.84) / 0.28)
        picture = picture * (1 - (0.65 - 1.8 * hop) * _smoothstep(1.2 * size, 0.5 * size, shadow))
        dx, dy = (u - center_u) / size, (v - center_v) / size
        dz = (1 - dx * dx - dy * dy).clamp(min=0).sqrt()
        turn = 2.6 * math.sin(1.5 * time)
        side, front = dx * math.cos(turn) - dy * math.sin(turn), dx * math.sin(turn) + dy * math.cos(turn)
        stripe = (torch.atan2(side, dz + 0.35 * front) / math.pi * 6).floor() % 3
        colors = torch.tensor([(0.95, 0.95, 0.92), (0.10, 0.35, 0.85), (0.98, 0.78, 0.10)])
        surface = colors[stripe.long()].permute(2, 0, 1)  # [3, H, W]
        light = (-0.45 * dx - 0.62 * dy + 0.64 * dz).clamp(min=0)
        surface = surface * (0.22 + 0.85 * light) + 0.8 * light**40
        return _blend(picture, surface, self._inside((torch.hypot(dx, dy) - 1) * size))

    def _paper(self, picture: _Picture, time: float) -> _Picture:
        """Confetti that falls and turns."""
        y, x = self._grid
        aspect = self.width / self.height
        for row in self.confetti.tolist():
            speed = 0.12 + 0.35 * row[2]
            dx = x - ((row[0] + 0.06 * math.sin(3 * time + 6 * row[3])) * 1.2 - 0.6) * aspect
            dy = y - ((row[1] + speed * time) % 1.1 - 0.05)
            angle = 6.3 * row[3] + (row[4] - 0.5) * 12 * time
            flip = 0.25 + 0.75 * abs(math.cos(5 * time * row[5] + row[6]))
            right, down = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
            edge = torch.maximum(right.abs() - 0.014, down.abs() - 0.009 * flip)
            hue = [0.55 + 0.45 * math.cos(6.3 * row[7] + phase) for phase in (0.0, 2.1, 4.2)]
            picture = _blend(picture, (hue[0], hue[1], hue[2]), self._inside(edge))
        return picture

    def _caption(self, picture: _Picture, time: float, index: int) -> _Picture:
        """A band with text that scrolls along the bottom, and a frame counter in a corner."""
        y, x = self._grid
        band = 0.085
        row = (y - (1 - band)) / band
        picture = _blend(picture, (0.04, 0.05, 0.09), 0.88 * self._inside((1 - band) - y))
        aspect = self.ticker.shape[1] / self.ticker.shape[0]
        scroll = _sample(self.ticker, ((x / band) + 5.5 * time + 3) / aspect, row)
        picture = _blend(picture, (1.0, 0.93, 0.55), scroll * self._inside((1 - band) - y))
        counter = _text_mask(f"{index:03d}", 48)
        size = 0.075
        left = x[0, 0] + 0.03
        ratio = counter.shape[1] / counter.shape[0]
        digits = _sample(counter, (x - left) / size / ratio, (y - 0.03) / size, wrap=False)
        return _blend(picture, (1.0, 1.0, 1.0), digits)

    def _inside(self, distance: _Plane) -> _Plane:
        """1 where the signed distance is negative, 0 where positive, over one pixel."""
        return (0.5 - distance / self.pixel).clamp(0, 1)


def _rgb(color: _Color) -> Float[Tensor, "3 1 1"]:
    return torch.tensor(color).reshape(3, 1, 1)


def _solid(color: _Color, like: _Plane) -> _Picture:
    return _rgb(color).expand(3, *like.shape)


def _blend(below: Float[Tensor, "3 h w"], above: Float[Tensor, "3 h w"] | _Color, alpha: _Plane) -> _Picture:
    top = _rgb(above) if isinstance(above, tuple) else above
    return below + (top - below) * alpha


def _smoothstep(start: float, end: float, value: _Plane) -> _Plane:
    ramp = ((value - start) / (end - start)).clamp(0, 1)
    return ramp * ramp * (3 - 2 * ramp)


def _to_integer(value: _Plane) -> _Plane:
    return (value - value.round()).abs()


def _sample(texture: Float[Tensor, "h w"], across: _Plane, down: _Plane, *, wrap: bool = True) -> _Plane:
    """Bilinear look-up; 1.0 is the size of the texture. Outside, it repeats or is 0."""
    across, down = torch.broadcast_tensors(across, down)
    if wrap:
        texture = functional.pad(texture[None], (0, 1, 0, 1), mode="circular")[0]
        across, down = across % 1, down % 1
    grid = torch.stack([2 * across - 1, 2 * down - 1], dim=-1)[None]  # [1, H, W, 2]
    return functional.grid_sample(texture[None, None], grid, align_corners=wrap)[0, 0]


def _sample_line(line: Float[Tensor, " N"], across: _Plane) -> _Plane:
    position = (across % 1) * line.shape[0]
    low = position.floor()
    left, right = line[low.long() % line.shape[0]], line[(low.long() + 1) % line.shape[0]]
    return left + (right - left) * (position - low)


def _text_mask(text: str, size: int) -> Float[Tensor, "h w"]:
    """White text on black in Pillow's own font, cut to its width."""
    font = ImageFont.load_default(size=size)
    box = font.getbbox(text)
    image = Image.new("L", (math.ceil(box[2]) + size // 8, math.ceil(size * 1.3)))
    ImageDraw.Draw(image).text((0, 0), text, fill=255, font=font)
    return torch.tensor(list(image.tobytes()), dtype=torch.float32).reshape(image.height, image.width) / 255
