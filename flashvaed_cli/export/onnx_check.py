"""Run exported graphs in onnxruntime on the CPU, as a user would, and compare with PyTorch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.errors import ExportError

NUM_TIMED_RUNS = 3
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_SILENT = 4  # onnxruntime's "fatal only": failures arrive as exceptions


class OnnxDecoder:
    """An exported decoder: one whole-clip graph, or the first-step and next-step graphs of a streaming one."""

    def __init__(self, first: Path, following: Path | None = None) -> None:
        self._first = _open_session(first)
        self._following = None if following is None else _open_session(following)

    def decode(
        self, latents: Float[Tensor, "B C Tz Hz Wz"], chunks: Sequence[int] | None = None
    ) -> Float[Tensor, "B 3 F H W"]:
        """Decode raw latents; `chunks` are the latent frames of each step (None: all in one).

        Raises:
            ExportError: onnxruntime refuses the graph at this size.
        """
        sizes = [latents.shape[2]] if chunks is None else list(chunks)
        frames: list[np.ndarray] = []
        caches: dict[str, np.ndarray] = {}
        for index, part in enumerate(latents.split(sizes, dim=2)):
            session = self._first if index == 0 else self._following
            assert session is not None, "a whole-clip graph takes all latents in one step"
            outputs = _run(session, part, caches)
            frames.append(outputs.pop("frames"))
            caches = {f"past_{name.removeprefix('future_')}": cache for name, cache in outputs.items()}
        return torch.from_numpy(np.concatenate(frames, axis=2)).float()


def alternating_ms(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
    """Median wall times of two functions, called in turn after a warm-up call of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(NUM_TIMED_RUNS + 1):
        for function, kept in zip((first, second), times, strict=True):
            start = time.perf_counter()
            function()
            if run > 0:
                kept.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def _open_session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no parent of their own
        raise ExportError(f"onnxruntime {onnxruntime.__version__} cannot load the exported graph: {error}") from error


def _run(
    session: onnxruntime.InferenceSession, latents: Tensor, caches: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    element = _NUMPY_TYPES[session.get_inputs()[0].type]
    names = [output.name for output in session.get_outputs()]
    try:
        outputs = session.run(names, {"latents": latents.numpy().astype(element), **caches})
    except Exception as error:
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} cannot run the exported graph on latents "
            f"{list(latents.shape)}: {error}"
        ) from error
    return {name: np.asarray(output) for name, output in zip(names, outputs, strict=True)}
