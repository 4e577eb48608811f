"""A folder in which every command has run once, and what each of them writes when it runs again."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from flashvaed_cli.artifact.store import content_sha256, read_metadata
from flashvaed_cli.errors import FlashVaedError
from flashvaed_cli.ownership import HEADER_KEY
from tests.commands import CALIBRATION, TRAINING, invoke
from tests.toy import write_toy_clip, write_toy_vae

_LATENCY = "--latency-frames 1 --latency-side 16 --num-latency-rounds 1 --width-latency-s 0"
_OF_TIME = ("_s", "_ms", "seconds", "_per_second", "speedup")
_JUDGING = "--num-speed-rounds 1 --lpips off --vmaf off --no-video"


@dataclass(frozen=True)
class FaultyCommand:
    """A command line that replaces its `output`, which an earlier run with another seed has made."""

    name: str
    words: str
    output: str

    def with_seed(self, seed: int) -> str:
        """What to type; --force replaces what is there. Decoding has no seed, but a frame rate."""
        varied = f"--fps {7 + seed}" if self.name == "decode" else f"--seed {seed}"
        return f"{self.words} {varied} --force --quiet"


COMMANDS = (
    FaultyCommand(
        "analyze", f"analyze vae.safetensors --data clip.mp4 {CALIBRATION} {_LATENCY}", "analysis.safetensors"
    ),
    FaultyCommand(
        "prune", f"prune vae.safetensors --ratio 0.5 --rule random --data clip.mp4 {CALIBRATION}", "pruned.safetensors"
    ),
    FaultyCommand("convert-ops", f"convert-ops vae.safetensors --data clip.mp4 {CALIBRATION}", "converted.safetensors"),
    FaultyCommand(
        "distill",
        f"distill pruned.safetensors --phase 3 --num-steps 2 --checkpoint-every-steps 1 --data clip.mp4 {TRAINING}",
        "flash.safetensors",
    ),
    FaultyCommand("eval", f"eval pruned.safetensors --data clip.mp4 --num-frames 5 {_JUDGING} -o report", "report"),
    FaultyCommand("export", "export pruned.safetensors -t safetensors -t diffusers -o export", "export"),
    FaultyCommand("decode", "decode latents.safetensors -d pruned.safetensors -o video.mp4", "video.mp4"),
)


def make_world(folder: Path) -> None:
    """Inputs, and an output of every command."""
    folder.mkdir(parents=True)
    write_toy_vae(folder / "vae.safetensors")
    write_toy_clip(folder / "clip.mp4")
    save_file(
        {"latents": torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))},
        folder / "latents.safetensors",
    )
    torch.set_num_threads(1)
    for command in COMMANDS:
        result = invoke(command.with_seed(1), cwd=folder)
        assert result.exit_code == 0, result.output
    _make_others(folder)


def _make_others(folder: Path) -> None:
    """Files of the same kinds and shapes in a hidden folder, to be put in place of those in the world."""
    others = folder / ".other"
    others.mkdir()
    write_toy_vae(others / "vae.safetensors", seed=1)
    write_toy_clip(others / "clip.mp4", num_frames=5)
    save_file({"latents": torch.ones(1, 16, 2, 4, 4)}, others / "latents.safetensors")
    changed = invoke(
        f"{COMMANDS[1].words} --seed 3 --quiet -o .other/pruned.safetensors".replace("vae.", ".other/vae."), cwd=folder
    )
    assert changed.exit_code == 0, changed.output


def copy_world(source: Path, target: Path) -> None:
    """A fresh copy, with the times of the files."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def files_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file by its path, leftovers of killed runs and lock files aside."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not is_leftover(path.relative_to(folder))
    }


def is_leftover(path: Path) -> bool:
    """Whether a path lies in what only a run that was cut short leaves behind."""
    return any(part.startswith(".") for part in path.parts)


def is_part_of(path: str, output: str) -> bool:
    """Whether a file is the output, lies in it, or stands beside it under its name."""
    return path == output or path.startswith((f"{output}/", f"{Path(output).stem}."))


def fault_of_output(folder: Path, output: str, names: set[str]) -> str | None:
    """What is wrong with an output that is not the old one; None for a whole one.

    Args:
        names: the files that a run without faults leaves.
    """
    place = folder / output
    if place.suffix == ".safetensors":
        try:
            content_sha256(place)
        except FlashVaedError as error:
            return str(error)
        return None
    if place.suffix == ".mp4":
        return None if place.stat().st_size > 0 else "empty"
    found = {path for path in files_of(folder) if path.startswith(f"{output}/")}
    if found != names:
        return f"files differ: {sorted(found ^ names)[:4]}"
    for path in place.glob("*.json"):
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            return f"{path.name}: {error}"
    return None


def negative_durations(output: Path) -> list[str]:
    """Names of figures of time or speed in an output that are below zero."""
    if output.suffix == ".safetensors":
        documents = [json.loads(read_metadata(output)[HEADER_KEY])]
    else:
        documents = [json.loads(path.read_bytes()) for path in output.glob("*.json")]
    return [name for document in documents for name in _negative(document, "")]


def _negative(value: object, name: str) -> list[str]:
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in _negative(item, key)]
    if isinstance(value, list):
        return [found for item in value for found in _negative(item, name)]
    return [name] if isinstance(value, int | float) and value < 0 and name.endswith(_OF_TIME) else []
