"""VMAF by an ffmpeg that has libvmaf: frames are passed on as they come, so nothing is stored.

Reference: Netflix, github.com/Netflix/vmaf; model vmaf_v0.6.1, ffmpeg's default. Both videos are converted to 8-bit
4:2:0, as they would be for viewing.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import UInt8

from flashvaed_cli.atomic import scratch_folder
from flashvaed_cli.errors import MetricUnavailableError

Pixels = UInt8[np.ndarray, "H W 3"]

_HOW_TO_GET = "pip install 'flashvaed[vmaf]' provides one"
_GRAPH = (
    "[0:v]format=yuv420p[a];[1:v]format=yuv420p[b];[a][b]libvmaf=log_fmt=json:n_threads={threads}:log_path=vmaf.json"
)
MIN_SIDE = 32
"""libvmaf's filters look at four scales."""


@cache
def find_ffmpeg() -> str:
    """An ffmpeg with libvmaf: the one of imageio-ffmpeg, else the one on the PATH.

    Raises:
        MetricUnavailableError: none.
    """
    for candidate in (_imageios(), shutil.which("ffmpeg")):
        if candidate is None:
            continue
        with suppress(OSError, subprocess.SubprocessError):
            command = [candidate, "-hide_banner", "-filters"]
            listed = subprocess.run(command, capture_output=True, timeout=30, check=True).stdout
            if b" libvmaf " in listed:
                return candidate
    raise MetricUnavailableError(f"VMAF is left out: there is no ffmpeg with libvmaf ({_HOW_TO_GET}).")


def _imageios() -> str | None:
    try:
        return str(importlib.import_module("imageio_ffmpeg").get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        return None


class VmafStream:
    """The VMAF of one clip, chunk by chunk. A context manager: leaving it always ends ffmpeg."""

    def __init__(self, ffmpeg: str, height: int, width: int) -> None:
        """Start an ffmpeg that reads frames of that size from two pipes."""
        self._scratch = scratch_folder("vmaf")
        self._folder = self._scratch.__enter__()
        readers, self._writers = zip(*(os.pipe() for _ in range(2)), strict=True)
        form = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "25"]
        inputs = [word for reader in readers for word in (*form, "-i", f"pipe:{reader}")]
        graph = _GRAPH.format(threads=os.cpu_count() or 1)
        self._process = subprocess.Popen(
            [ffmpeg, "-hide_banner", "-loglevel", "error", "-nostdin", *inputs, "-lavfi", graph, "-f", "null", "-"],
            cwd=self._folder,
            pass_fds=readers,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for reader in readers:
            os.close(reader)
        self._pool = ThreadPoolExecutor(2)  # ffmpeg may want more of one video before it takes the other

    def __enter__(self) -> VmafStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_pipes()
        if self._process.poll() is None:
            self._process.kill()
        if self._process.stderr is not None and not self._process.stderr.closed:
            self._process.communicate()
        self._pool.shutdown()
        self._scratch.__exit__(None, None, None)

    def update(self, output: Iterable[Pixels], reference: Iterable[Pixels]) -> None:
        """Add the next frames, RGB with 8 bits.

        Raises:
            MetricUnavailableError: ffmpeg ended early.
        """
        jobs = [
            self._pool.submit(self._feed, writer, frames)
            for writer, frames in zip(self._writers, (output, reference), strict=True)
        ]
        try:
            for job in jobs:
                job.result()
        except BrokenPipeError as error:
            raise self._failure() from error

    def result(self) -> float:
        """The mean over frames.

        Raises:
            MetricUnavailableError: ffmpeg failed.
        """
        self._close_pipes()
        _, complaint = self._process.communicate()
        try:
            log = json.loads((Path(self._folder) / "vmaf.json").read_bytes())
            return float(log["pooled_metrics"]["vmaf"]["mean"])
        except (OSError, ValueError, KeyError) as error:
            raise self._failure(complaint) from error

    def _feed(self, writer: int, frames: Iterable[Pixels]) -> None:
        for frame in frames:
            left = memoryview(np.ascontiguousarray(frame).tobytes())
            while left:
                left = left[os.write(writer, left) :]

    def _close_pipes(self) -> None:
        for writer in self._writers:
            os.close(writer)
        self._writers = ()

    def _failure(self, complaint: bytes = b"") -> MetricUnavailableError:
        said = (complaint.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
        return MetricUnavailableError(f"VMAF: ffmpeg failed: {said}")
