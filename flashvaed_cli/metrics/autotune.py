"""Which way of running a decoder is fastest on this machine: measured, not guessed, and remembered in files.

Memory layout and operators are tried together, then chunk sizes with the best of them, then compilation with the
best of those: the choices hardly interact beyond that, and trying all combinations would take many times as long.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import ConfigDict, PositiveInt, TypeAdapter, with_config

from flashvaed_cli import __version__
from flashvaed_cli.atomic import atomic_path
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.metrics.contest import Contestant, run_contest
from flashvaed_cli.paths import cache_folder
from flashvaed_cli.progress import Progress, SilentProgress

MemoryLayout = Literal["contiguous", "channels-last"]
CHUNKS = (1, 2, 4, 8)
_FORMATS: tuple[MemoryLayout, ...] = ("contiguous", "channels-last")
_NUM_ROUNDS = 3


@with_config(ConfigDict(extra="forbid"))
@dataclass(frozen=True)
class Choice:
    """One way of running a decoder: `exact` uses exact operators; `chunk` None decodes everything at once."""

    memory_format: MemoryLayout = "channels-last"
    exact: bool = True
    compile: bool = False
    chunk: PositiveInt | None = None

    def __str__(self) -> str:
        """As shown in tables."""
        operators = "exact operators" if self.exact else "plain operators"
        chunk = "" if self.chunk is None else f", chunk {self.chunk}"
        return f"{operators}, {self.memory_format}{', compiled' if self.compile else ''}{chunk}"


_CHOICE = TypeAdapter(Choice)


@dataclass(frozen=True)
class Tuning:
    """The fastest choice and the median seconds of all that were tried (empty when it was remembered)."""

    choice: Choice
    tried: tuple[tuple[Choice, float], ...] = ()


def autotune(
    prepare: Callable[[Choice], Callable[[], object]],
    device: torch.device | str,
    *,
    num_latents: int,
    fixed_chunk: int | None = None,
    with_compile: bool = False,
    progress: Progress | None = None,
) -> Tuning:
    """Try the choices in steps and keep the fastest. Those that run out of memory drop out.

    Args:
        prepare: makes the call of one choice, ready to be timed.
        num_latents: latent frames of the clip; larger chunks are not tried.
        fixed_chunk: the only chunk size allowed; None tries several.
        with_compile: try compilation too (minutes for a large decoder).
    Raises:
        MemoryError: no choice fits into memory.
    """
    tried: dict[Choice, float] = {}

    def best_of(choices: Sequence[Choice]) -> Choice | None:
        contestants = [Contestant(str(c), lambda c=c: prepare(c)) for c in choices]
        results = run_contest(contestants, device, num_rounds=_NUM_ROUNDS, progress=progress or SilentProgress())
        found = {c: r.speed.median for c, r in zip(choices, results, strict=True) if r.speed is not None}
        tried.update(found)
        return min(found, key=lambda c: found[c]) if found else None

    chunks = [fixed_chunk] if fixed_chunk else [None, *(chunk for chunk in CHUNKS if chunk < num_latents)]
    best = None
    for chunk in (chunks[0], *reversed(chunks[1:])):  # all at once, else the largest chunk that fits
        best = best_of([Choice(layout, exact, False, chunk) for layout in _FORMATS for exact in (True, False)])
        if best is not None:
            break
    if best is None:
        raise MemoryError("no way of running the decoder fits into memory")
    # The best so far competes again, so that only times from one run are compared.
    if others := [replace(best, chunk=chunk) for chunk in chunks if chunk != best.chunk]:
        best = best_of([best, *others]) or best
    if with_compile:
        best = best_of([best, replace(best, compile=True)]) or best
    return Tuning(best, tuple(tried.items()))


def choice_file(key: str) -> Path:
    """Where the choice of a key is remembered: a file of its own, in `autotune` in the user's cache folder.

    Processes that remember different choices at the same time so lose none.

    Raises:
        FileNotFoundError: the user has no home folder.
    """
    return cache_folder() / "autotune" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def cache_key(
    spec: DecoderSpec, grid: tuple[int, int, int], dtype: torch.dtype, device: torch.device, **more: object
) -> str:
    """What a choice depends on: the machine, torch, this program, the decoder, the size and the user's constraints."""
    facts = {
        "flashvaed": __version__,
        "device": device_name(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "spec": hashlib.sha256(spec.model_dump_json().encode()).hexdigest()[:16],
        "grid": "x".join(map(str, grid)),
        **more,
    }
    return ", ".join(f"{key}={value}" for key, value in facts.items() if value is not None)


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return _processor_name()
    return device.type


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def remembered_choice(path: Path, key: str) -> Choice | None:
    """The choice that a file holds for a key; None if it holds none, or cannot be read."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return _CHOICE.validate_json(json.dumps(entry["choice"]), strict=True) if entry["key"] == key else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def remember_choice(path: Path, key: str, choice: Choice) -> None:
    """Store a choice. Raises OSError."""
    with atomic_path(path) as sibling:
        sibling.write_text(json.dumps({"key": key, "choice": asdict(choice)}, indent=2) + "\n", encoding="utf-8")
