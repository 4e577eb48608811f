"""Decoding, set up once and used for any number of clips: dtype, layout, chunks, tiles, compilation.

A step is a function of latents and state: the runtime holds weights and settings, a run holds its state, so
runs may be interleaved. Frames come out while later ones are still to be decoded.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import shutil
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.modules.bands import bands
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.modules.memory_format import channels_last, use_channels_last
from flashvaed_cli.decoders.predict.cost import Grid
from flashvaed_cli.decoders.predict.lookahead import LatentWindow, usual_chunk
from flashvaed_cli.decoders.predict.memory import ITEM_BYTES, DType
from flashvaed_cli.decoders.predict.planning import DecodePlan, choose_plan
from flashvaed_cli.decoders.predict.tiling import TileLayout, TileWindow, tile_layout
from flashvaed_cli.decoders.run.buffers import TileBuffer, WindowBuffer, buffer_of, frames_of_parts
from flashvaed_cli.decoders.run.heap import return_freed_memory
from flashvaed_cli.decoders.run.overflow import explain_overflow
from flashvaed_cli.decoders.run.streaming import State, check_latents, decode_in_steps
from flashvaed_cli.decoders.run.temporal_tiles import Blender
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.variants.half_range import cast_decoder
from flashvaed_cli.errors import DecodeError, NonFiniteError, SpecError
from flashvaed_cli.limits import MAX_LATENT

BlockRun = Callable[[Tensor, State | None, State | None], Tensor]
"""Runs some blocks of a decoder: input, past and future to output."""
_ENDLESS = 1 << 20  # latent frames assumed of a clip of unknown length: more than any chunk, so that its state counts
_LONG_CLIP = 256  # the same for a decoder whose state grows with the clip


@dataclass(frozen=True)
class DecodeSettings:
    """How to decode. All settings but `whole_clip` and `clip_length` give the same frames, up to rounding.

    Attributes:
        chunk: latent frames per step; None: all at once, or what `max_memory_bytes` allows.
        tile: side of a tile in latents; None: whole frames, or what `max_memory_bytes` asks for.
        dtype: of weights, activations and frames; None: the decoder's own. Norms keep float32 statistics.
        memory_format: layout of weights and activations.
        compile: run `torch.compile`d steps. Every shape of step compiles once, at its first use (minutes for
            a full-size decoder): at most two per clip size, four with tiles.
        max_memory_bytes: limit of the predicted peak, weights included. Chooses `chunk` and `tile` where they are None.
            On the CPU freed tensors then go back to the system at once (`decoders.run.heap`, process-wide).
        compile_backend: `inductor` generates code; others are for debugging.
        whole_clip: for a decoder that sees whole clips: decode clips of any length at once instead of in tiles in
            time, which gives other frames than the original's.
        clip_length: for such a decoder: latents per tile, in place of its spec's.
    """

    chunk: int | None = None
    tile: int | None = None
    dtype: torch.dtype | None = None
    memory_format: Literal["contiguous", "channels-last"] = "channels-last"
    compile: bool = False
    max_memory_bytes: int | None = None
    compile_backend: str = "inductor"
    whole_clip: bool = False
    clip_length: int | None = None


class DecodeRuntime:
    """A decoder with its settings. The decoder that is passed in is not changed, unless its weights are shared."""

    def __init__(self, decoder: Decoder, settings: DecodeSettings, *, shares_weights: bool = False) -> None:
        """Cast and lay out the weights once.

        Args:
            shares_weights: run the decoder itself, laid out and cast in place, instead of a copy.
        Raises:
            DecodeError: `compile` is set and this machine has no compiler for it.
            SpecError: a clip length that does not fit, or for a decoder that has none.
        """
        parameter = next(decoder.parameters())
        self.spec, self.settings = decoder.spec, settings
        if settings.whole_clip or settings.clip_length is not None:
            self.spec = decoder.spec.with_clip_length(settings.clip_length)
        self.device, self.dtype = parameter.device, settings.dtype or parameter.dtype
        if settings.compile and settings.compile_backend == "inductor":
            require_compiler(self.device)
        if settings.max_memory_bytes is not None and self.device.type == "cpu":
            return_freed_memory()
        self._decoder = _prepared(decoder if shares_weights else copy.deepcopy(decoder), settings)
        self._sections: dict[tuple[str | None, str | None], _Section] = {}

    def plan(self, latents: Float[Tensor, "B C T Hz Wz"]) -> DecodePlan:
        """Chunk and tiles for these latents, with the predicted peak memory.

        Raises:
            DecodeError: nothing fits `max_memory_bytes`.
            SpecError: the latents, `chunk` or `tile` do not fit the decoder.
        """
        check_latents(self.spec, latents)
        batch, _, num_latents, height, width = latents.shape
        return self._plan((num_latents, height, width), batch)

    def _plan(self, grid: Grid, batch: int, *, chunk: int | None = None) -> DecodePlan:
        settings = self.settings
        return plan_on(
            self.device,
            self.spec,
            grid,
            self.dtype,
            max_memory_bytes=settings.max_memory_bytes,
            chunk=chunk if settings.chunk is None else settings.chunk,
            tile=settings.tile,
            channels_last=settings.memory_format == "channels-last",
            compiled=settings.compile,
            batch=batch,
        )

    def _plan_of_parts(self, part: Tensor, num_latents: int | None) -> DecodePlan:
        """For a decoder that is not causal: in steps as large as is asked for, or as they gain."""
        batch, _, _, height, width = part.shape
        chunk = usual_chunk(self.spec) if self.settings.max_memory_bytes is None else None
        return self._plan((num_latents or _ENDLESS, height, width), batch, chunk=chunk)

    def open(self, height: int, width: int, *, batch: int = 1, num_latents: int | None = None) -> DecodeStream:
        """Start a clip whose latents come in parts.

        Args:
            height, width: of the latents.
            num_latents: latent frames of the whole clip; None: not known yet.
        Raises:
            DecodeError, SpecError: as `plan` does.
        """
        assumed = num_latents or (_LONG_CLIP if self.spec.grows_state else _ENDLESS)
        plan = self._plan((assumed, height, width), batch)
        return DecodeStream(self, plan, (batch, height, width), num_latents)

    def iter_decode(self, latents: Float[Tensor, "B C T Hz Wz"]) -> Iterator[Float[Tensor, "B 3 F H W"]]:
        """Yield the frames of raw latents step by step, in the runtime's dtype, clamped to [-1, 1].

        The latents may lie on another device than the decoder; the frames are on the decoder's.

        Raises:
            DecodeError, SpecError: as `plan` does, before the first frame.
        """
        plan = self.plan(latents)
        run = _Run(self, self._layout(plan, latents.shape[3], latents.shape[4]))
        for frames in decode_in_steps(self.spec, latents, plan.chunk, run.step):
            yield frames.clamp_(-1.0, 1.0)

    def iter_parts(
        self, parts: Iterable[Float[Tensor, "_B _C _t _Hz _Wz"]], *, num_latents: int | None = None
    ) -> Iterator[Float[Tensor, "_B 3 _f _H _W"]]:
        """Yield the frames of each part of a clip whose latents come in parts, clamped to [-1, 1].

        A decoder that sees frames ahead first reads the parts that it needs, and decodes several in one step, because
        each step reads its halo too; one that sees whole clips first reads whole tiles.

        Args:
            num_latents: latent frames of all parts, for the plan, and to keep no state for a part that does not come;
                None: not known.
        Raises:
            DecodeError, SpecError: as `plan` does.
            NonFiniteError: frames hold NaN or infinite values.
        """
        if self.spec.is_causal:
            stream: DecodeStream | None = None
            for part in parts:
                stream = stream or self.open(*part.shape[3:], batch=part.shape[0], num_latents=num_latents)
                yield stream.step(part)
            return
        sizes: deque[int] = deque()
        yield from frames_of_parts(self.spec, sizes, self._windows_of_parts(parts, sizes, num_latents))

    def _windows_of_parts(
        self, parts: Iterable[Tensor], sizes: deque[int], num_latents: int | None
    ) -> Iterator[Tensor]:
        """The kept frames of one window after the other; the latents of each part that is read go to `sizes`."""
        buffer: WindowBuffer | TileBuffer | None = None
        layout: TileLayout | None = None
        blender = Blender()
        for part in parts:
            sizes.append(part.shape[2])
            if buffer is None:
                plan = self._plan_of_parts(part, num_latents)
                buffer, layout = buffer_of(self.spec, plan.chunk), self._layout(plan, *part.shape[3:])
            for window in buffer.push(part):
                yield self._window(*window, layout, blender)
        for window in buffer.finish() if buffer is not None else ():
            yield self._window(*window, layout, blender)

    def _window(self, latents: Tensor, window: LatentWindow, layout: TileLayout | None, blender: Blender) -> Tensor:
        """The kept frames of a window of latents, decoded as a video of its own."""
        return blender.frames(_Run(self, layout).step(latents, first=True, last=True), window).clamp_(-1.0, 1.0)

    def require_usable(self, latents: Tensor) -> None:
        """Refuse latents that no decoder can take: NaN, infinite, or so large that a norm overflows and gives zeros.

        Raises:
            NonFiniteError: they are.
        """
        largest = float(latents.detach().abs().amax())
        if not largest <= MAX_LATENT:
            found = f"values up to {largest:.2g}" if math.isfinite(largest) else "NaN or infinite values"
            raise NonFiniteError(f"the latents hold {found}, where latents are about 10. Check where they come from.")

    def require_finite(self, frames: Tensor, latents: Tensor) -> None:
        """Refuse frames that hold NaN or infinite values, and name the layer where they first appear.

        Raises:
            NonFiniteError: they do.
        """
        if frames.numel() == 0 or all(map(math.isfinite, (frames.amin().item(), frames.amax().item()))):  # no copies
            return
        raise NonFiniteError(explain_overflow(self._decoder, latents.to(device=self.device, dtype=self.dtype)))

    def decode(self, latents: Float[Tensor, "B C T Hz Wz"]) -> Float[Tensor, "B 3 F H W"]:
        """All frames of raw latents: `iter_decode`, joined without a second copy of the video."""
        check_latents(self.spec, latents)
        num_frames = self.spec.num_frames(latents.shape[2])
        video: Tensor | None = None
        done = 0
        for frames in self.iter_decode(latents):
            if frames.shape[2] == num_frames:
                return frames
            if video is None:
                batch, width, _, *size = frames.shape
                video = frames.new_empty(batch, width, num_frames, *size)
            video[:, :, done : done + frames.shape[2]] = frames
            done += frames.shape[2]
        return cast(Tensor, video)

    def _layout(self, plan: DecodePlan, height: int, width: int) -> TileLayout | None:
        if plan.tile is None or plan.split is None:
            return None
        return tile_layout(self.spec, height, width, tile=plan.tile, split=plan.split)

    def section(self, start: str | None, stop: str | None) -> _Section:
        """The blocks from the address `start` up to, but without, `stop`; built at first use."""
        if (start, stop) not in self._sections:
            self._sections[start, stop] = _Section(partial(self._decoder.run, start=start, stop=stop), self.settings)
        return self._sections[start, stop]


class DecodeStream:
    """One clip that is decoded as its latents come; see `DecodeRuntime.open`.

    A causal decoder returns the frames of a step at once. One that sees frames ahead or whole clips returns those that
    no later latent can change, perhaps none, and the rest with `flush`.
    """

    def __init__(
        self, runtime: DecodeRuntime, plan: DecodePlan, size: tuple[int, int, int], num_latents: int | None = None
    ) -> None:
        self._runtime, self.plan, self._size = runtime, plan, size
        self._remaining = num_latents
        self._layout = runtime._layout(plan, *size[1:])
        self._run = _Run(runtime, self._layout)
        self._buffer = None if runtime.spec.is_causal else buffer_of(runtime.spec)
        self._blender = Blender()
        self._begun = self._ended = False

    def step(self, latents: Float[Tensor, "B C T Hz Wz"]) -> Float[Tensor, "B 3 F H W"]:
        """Decode the next latents: the frames that are settled now, clamped, in the runtime's dtype; F may be 0.

        Raises:
            SpecError: the latents are not of the batch, channels and size that the stream was opened for, are more than
                it was opened for, or it was flushed.
            NonFiniteError: frames hold NaN or infinite values.
        """
        batch, height, width = self._size
        expected = (batch, self._runtime.spec.latent_width, height, width)
        if latents.ndim != 5 or (*latents.shape[:2], *latents.shape[3:]) != expected or latents.shape[2] < 1:
            shown = f"[{batch}, {expected[1]}, T, {height}, {width}]"
            raise SpecError(f"this stream was opened for latents {shown}, got {list(latents.shape)}")
        if self._ended:
            raise SpecError("this stream was flushed; open another one for another clip")
        if self._remaining is not None and latents.shape[2] > self._remaining:
            raise SpecError(f"this stream was opened for {self._remaining} more latents, got {latents.shape[2]}")
        frames = []
        for part in latents.split(self.plan.chunk, dim=2):
            if self._buffer is None:
                frames.append(self._run.step(part, first=not self._begun, last=self._is_last(part)).clamp_(-1.0, 1.0))
            else:
                frames += self._decoded(self._buffer.push(part))
            self._begun = True
        return self._together(frames)

    def flush(self) -> Float[Tensor, "B 3 F H W"]:
        """End the clip and the stream: the remaining frames, none for a causal decoder."""
        self._ended = True
        return self._together([] if self._buffer is None else self._decoded(self._buffer.finish()))

    def _is_last(self, part: Tensor) -> bool:
        """Whether the clip ends with a part, which is about to be decoded."""
        if self._remaining is None:
            return False
        self._remaining -= part.shape[2]
        return self._remaining == 0

    def _decoded(self, windows: Iterator[tuple[Tensor, LatentWindow]]) -> list[Tensor]:
        return [self._runtime._window(*window, self._layout, self._blender) for window in windows]

    def _together(self, frames: list[Tensor]) -> Tensor:
        if frames:
            return torch.cat(frames, dim=2) if len(frames) > 1 else frames[0]
        batch, *sides = self._size
        size = [side * self._runtime.spec.spatial_factor for side in sides]
        return torch.empty(batch, 3, 0, *size, device=self._runtime.device, dtype=self._runtime.dtype)


class _Run:
    """The state of one clip in progress: of the decoder's sections, and of each tile."""

    def __init__(self, runtime: DecodeRuntime, layout: TileLayout | None) -> None:
        self._runtime = runtime
        self._layout = layout if layout is not None and layout.num_tiles > 1 else None
        split = None if self._layout is None else self._layout.split
        self._before = runtime.section(None, split)
        self._before_state: State = {}
        self._compiles = runtime.settings.compile
        self._device, self._dtype = runtime.device, runtime.dtype
        if self._layout is not None:
            self._tiled = runtime.section(split, None)
            self._tile_states: list[State] = [{} for _ in range(self._layout.num_tiles)]

    @torch.no_grad()
    def step(self, latents: Tensor, *, first: bool, last: bool) -> Tensor:
        """The next frames, not clamped; see `Step`."""
        self._runtime.require_usable(latents)
        if self._compiles and self._runtime.spec.grows_state and not (first and last):
            raise DecodeError(
                "a compiled step has one shape, and the state of this decoder grows from step to step: decode the clip "
                "in one step (without a chunk), or without compile"
            )
        # A compiled step returns its state unless it is the only one: no third graph for the last.
        keep = not last or (self._compiles and not first)
        x = self._before(latents.to(device=self._device, dtype=self._dtype), self._before_state, first=first, keep=keep)
        frames = x if self._layout is None else self._in_tiles(x, first=first, keep=keep)
        self._runtime.require_finite(frames, latents)  # before infinite ones are clamped
        return frames

    def _in_tiles(self, x: Tensor, *, first: bool, keep: bool) -> Tensor:
        layout = cast(TileLayout, self._layout)
        frames: Tensor | None = None
        windows = [(row, column) for row in layout.rows for column in layout.columns]
        for state, (row, column) in zip(self._tile_states, windows, strict=True):
            window = x[:, :, :, row.start : row.stop, column.start : column.stop]
            tile = self._tiled(window, state, first=first, keep=keep)
            if frames is None:
                size = (axis[-1].keep_stop * layout.enlargement for axis in (layout.rows, layout.columns))
                frames = tile.new_empty(*tile.shape[:3], *size)
            (to_row, from_row), (to_column, from_column) = (_kept(w, layout.enlargement) for w in (row, column))
            frames[:, :, :, to_row, to_column] = tile[:, :, :, from_row, from_column]
        return cast(Tensor, frames)


def _kept(window: TileWindow, enlargement: int) -> tuple[slice, slice]:
    """Where the kept pixels of a window lie in the frame, and where in the window."""
    start, stop, offset = (side * enlargement for side in (window.keep_start, window.keep_stop, window.start))
    return slice(start, stop), slice(start - offset, stop - offset)


class _Section:
    """A run of blocks, eager or compiled; updates its state in place."""

    def __init__(self, run: BlockRun, settings: DecodeSettings) -> None:
        self._run = run
        self._settings = settings
        self._compiled: dict[tuple, Callable[..., tuple[Tensor, State | None]]] = {}

    def __call__(self, x: Tensor, state: State, *, first: bool, keep: bool) -> Tensor:
        """Run a step. `state` is read unless `first`; if `keep`, it then holds what the next step needs."""
        is_last = self._settings.memory_format == "channels-last"
        x = channels_last(x) if is_last else x.contiguous()
        past = None if first else state
        if not self._settings.compile:
            # One dictionary for both: a layer's old frames are freed as soon as it has read them.
            with bands():
                return self._run(x, past, state if keep else None)
        form = torch.channels_last_3d if is_last else torch.contiguous_format
        x = _with_strides_of(x, form)
        key = (x.shape, first, keep)
        if key not in self._compiled:
            self._compiled[key] = _compile_step(self._run, self._settings.compile_backend, keep=keep)
        y, future = self._compiled[key](x, past)
        if future is not None:
            state.update({address: _with_strides_of(frames, form) for address, frames in future.items()})
        return y


def _with_strides_of(x: Tensor, form: torch.memory_format) -> Tensor:
    """`x` with exactly the strides of a format, on sides of length 1 too: a graph is for one set of strides."""
    settled = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=form)
    return x if x.stride() == settled.stride() else settled.copy_(x)


def _compile_step(run: BlockRun, backend: str, *, keep: bool) -> Callable[..., tuple[Tensor, State | None]]:
    """A static graph from input and state to output and state."""

    def step(x: Tensor, past: State | None) -> tuple[Tensor, State | None]:
        future: State | None = {} if keep else None
        return run(x, past, future), future

    # dynamo limits the number of graphs per code object, so every shape gets a code object of its own.
    own = types.FunctionType(step.__code__.replace(), step.__globals__, "step", None, step.__closure__)
    return torch.compile(own, backend=backend, dynamic=False, fullgraph=True)


def _prepared(decoder: Decoder, settings: DecodeSettings) -> Decoder:
    """The decoder for inference, cast and laid out in place."""
    prepared = decoder.eval().requires_grad_(False)
    if settings.dtype is not None:
        prepared = cast_decoder(prepared, settings.dtype)
    return use_channels_last(prepared) if settings.memory_format == "channels-last" else prepared


def _dtype_name(dtype: torch.dtype) -> DType:
    name = str(dtype).removeprefix("torch.")
    if name not in ITEM_BYTES:
        raise DecodeError(f"a decoder cannot run in {name}: use one of {', '.join(ITEM_BYTES)}")
    return cast(DType, name)


def plan_on(
    device: torch.device,
    spec: DecoderSpec,
    grid: Grid,
    dtype: torch.dtype,
    *,
    max_memory_bytes: int | None = None,
    chunk: int | None = None,
    tile: int | None = None,
    channels_last: bool = True,
    compiled: bool = False,
    batch: int = 1,
) -> DecodePlan:
    """The plan of a runtime on a device; see `choose_plan`, which raises the same."""
    return choose_plan(
        spec,
        grid,
        max_memory_bytes=max_memory_bytes,
        dtype=_dtype_name(dtype),
        chunk=chunk,
        tile=tile,
        channels_last=channels_last,
        has_kernels=has_kernels(dtype, device),
        in_bands=device.type == "cpu" and not compiled,
        batch=batch,
    )


def has_kernels(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device has native convolutions for a dtype; without them torch takes more memory and time."""
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    supported = torch.ops.mkldnn
    return bool(
        supported._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else supported._is_mkldnn_fp16_supported()
    )


def require_compiler(device: torch.device) -> None:
    """Check for what `inductor` needs, so that the error names what is missing.

    Raises:
        DecodeError: no C++ compiler (CPU), or no Triton or C compiler (CUDA).
    """
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise DecodeError("compiling for CUDA needs the package triton: install it, or decode without compile")
        compilers = [os.environ.get("CC"), "gcc", "clang", "cc"]
    else:
        compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++"]
    if not any(shutil.which(name) for name in compilers if name):
        raise DecodeError(
            f"compiling for {device.type} needs a C++ compiler, and none of {', '.join(c for c in compilers if c)} "
            "is on the PATH: install one (or set CXX), or decode without compile"
        )
