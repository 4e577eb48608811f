"""Every family's exports in the programs that they are for: how far their frames are from the decoder's own.

A toy of each family with random weights, as an original and as a student (three quarters of the shallow channels, the
paper's operators, nothing refitted). Each export is loaded and run by the other program, on latents of a size that no
graph was traced with. Prints one table, differences as a share of the range of the frames.

`FLASHVAED_BENCH_FAMILIES=wan2.2,ltx-2` chooses. ComfyUI is run where `make comfyui` has put its code, OpenVINO where it
is installed.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import onnxruntime
import pytest
import torch
from torch import Tensor

from flashvaed_cli import __version__
from flashvaed_cli.artifact.checkpoint import Checkpoint
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.export.onnx_graph import OnnxOptions, export_onnx
from flashvaed_cli.export.parity import seeded_latents
from flashvaed_cli.families.registry import FAMILIES
from flashvaed_cli.report.tables import Cell, Column, TableData, to_markdown
from flashvaed_cli.stages.export.layouts import diffusers_obstacle
from tests.comfyui.test_in_comfyui import COMFYUI, in_comfyui
from tests.commands import succeed
from tests.integration.test_families import TOYS, loaded
from tests.parity.oracles import share_of_range

diffusers: Any = pytest.importorskip("diffusers", reason="one of the programs; pip install '.[dev]'")

CHOSEN = os.environ.get("FLASHVAED_BENCH_FAMILIES", ",".join(FAMILIES)).split(",")
GRID = (2, 4, 3)  # latent frames, height, width; a family of images has one frame
FLASH_CLASS = "AutoencoderFlash"
Kind = Literal["original", "student"]

pytestmark = pytest.mark.usefixtures("as_users_run_it")


class Unavailable(Exception):
    """There is nothing to compare: what the cell shows, and the reason for a line below the table."""

    def __init__(self, cell: str | None, reason: str) -> None:
        super().__init__(reason)
        self.cell, self.reason = cell, reason


@dataclass(frozen=True)
class Exported:
    """A toy's decoder and what `export` wrote of it.

    Attributes:
        folder: holds `vae.onnx` and the folder `export`.
        latents, normalized: the same latents on both scales, `[1, C, Tz, Hz, Wz]`.
        frames: the decoder's own, in [-1, 1].
    """

    checkpoint: Checkpoint
    folder: Path
    name: str
    latents: Tensor
    normalized: Tensor
    frames: Tensor

    @property
    def export(self) -> Path:
        return self.folder / "export"

    @property
    def onnx(self) -> Path:
        return self.folder / f"{self.name}.onnx"


@dataclass
class Findings:
    """What the table shows: rows, reasons for what is missing, versions of the programs."""

    rows: list[tuple[Cell, ...]] = field(default_factory=list)
    reasons: dict[str, None] = field(default_factory=dict)
    comfyui: str = "not here (make comfyui)"

    def programs(self) -> str:
        names = ("diffusers", "onnxruntime", "openvino", "torch")
        stated = {name: installed_version(name) for name in names} | {"ComfyUI": self.comfyui}
        return ", ".join(f"{name} {stated[name]}" for name in stated) + f"; flashvaed {__version__}"


def installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def in_diffusers(given: Exported, findings: Findings) -> tuple[Tensor, str]:
    """The stock class for an original, `AutoencoderFlash` for a student."""
    obstacle = diffusers_obstacle(given.checkpoint)
    if obstacle is not None:
        raise Unavailable(None, obstacle)
    place = given.export / "diffusers"
    config = json.loads((place / "config.json").read_text())
    name = config["_class_name"]
    stock = config.get("base_class", name)
    if not hasattr(diffusers, stock):
        raise Unavailable(None, f"{given.checkpoint.family}: diffusers {diffusers.__version__} has no {stock}.")
    if name == FLASH_CLASS:
        vae = diffusers.AutoModel.from_pretrained(str(place), trust_remote_code=True).to("cpu")
        assert type(vae).__name__ == FLASH_CLASS
        return vae.decode(given.latents).sample.clamp(-1, 1), ""
    vae = getattr(diffusers, stock).from_pretrained(place)
    scales = [parameter for key, parameter in vae.named_parameters() if "per_channel_scale" in key]
    if any(scale.any() for scale in scales):
        findings.reasons[f"{given.checkpoint.family}: the class adds noise of its own; it is switched off here."] = None
        for scale in scales:
            scale.zero_()
    # The file holds the decoder at its own timestep, so any other gives the same frames.
    timestep = (torch.tensor([0.5]),) if vae.config.get("timestep_conditioning") else ()
    frames = vae.decode(given.latents, *timestep).sample[:, :3]  # Qwen-Image 2 gives an alpha channel too
    return frames.clamp(-1, 1), ""


def in_onnxruntime(given: Exported, _: Findings) -> tuple[Tensor, str]:
    session = onnxruntime.InferenceSession(given.onnx, providers=["CPUExecutionProvider"])
    (frames,) = session.run(["frames"], {"latents": given.latents.numpy()})
    return torch.from_numpy(frames), ""


def in_openvino(given: Exported, _: Findings) -> tuple[Tensor, str]:
    if find_spec("openvino") is None:
        raise Unavailable("not installed", "OpenVINO: `pip install openvino` adds its column.")
    core = importlib.import_module("openvino").Core()
    # Without the hint it computes in bfloat16 where the processor can.
    compiled = core.compile_model(core.read_model(given.onnx), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled({"latents": given.latents.numpy()})["frames"].copy()), ""


def in_torch_export(given: Exported, _: Findings) -> tuple[Tensor, str]:
    return torch.export.load(given.export / f"{given.name}.pt2").module()(given.latents), ""


def in_comfy(given: Exported, findings: Findings) -> tuple[Tensor, str]:
    """A file for ComfyUI's own loader, or a folder with our node, in ComfyUI's VAEDecode."""
    if not (COMFYUI / "comfy").is_dir():
        raise Unavailable("not here (make comfyui)", "ComfyUI: `make comfyui` gets its code.")
    file = given.export / "comfyui" / f"{given.name}.safetensors"
    place = file if file.is_file() else file.with_suffix("")
    # Its samplers hand LTX's latents on as they are, and scale the others.
    latents = given.normalized if given.checkpoint.family.startswith("ltx") else given.latents
    pictures, metadata = in_comfyui(place, latents, given.folder)
    findings.comfyui = metadata["version"]
    frames = pictures["whole"].permute(3, 0, 1, 2)[None] * 2 - 1  # [1, 3, F, H, W]
    return frames, "file" if place == file else "node"


def in_flashvaed(given: Exported, _: Findings) -> tuple[Tensor, str]:
    """The family's own key layout, read by our own reader: no other program reads it at a student's widths."""
    again = loaded(given.export, f"{given.name}.safetensors")
    return decode(again.require_decoder(), given.latents), "own reader"


@dataclass(frozen=True)
class Target:
    """A column: how its frames are made, and how far from the decoder's they may be, as a share of their range."""

    name: str
    frames_of: Callable[[Exported, Findings], tuple[Tensor, str]]
    bounds: dict[Kind, float]


# As the tests of each export have it. A student's norms over three random channels magnify rounding.
TARGETS = (
    Target("diffusers", in_diffusers, {"original": 1e-5, "student": 1e-4}),
    Target("ONNX, onnxruntime", in_onnxruntime, {"original": 1e-4, "student": 1e-4}),
    Target("ONNX, OpenVINO", in_openvino, {"original": 1e-4, "student": 1e-4}),
    Target("pt2, torch.export", in_torch_export, {"original": 1e-5, "student": 1e-4}),
    Target("ComfyUI", in_comfy, {"original": 1e-5, "student": 1e-4}),
    Target("safetensors", in_flashvaed, {"original": 1e-5, "student": 1e-5}),
)


def printed_table(findings: Findings) -> str:
    names = ("family", "decoder", *(target.name for target in TARGETS))
    columns = tuple(Column(name, align="left" if name in names[:2] else "right") for name in names)
    title = "Exports in other programs: largest difference from the decoder's own frames, as a share of their range"
    below = (
        f"Programs: {findings.programs()}. CPU, float32, toys with random weights.",
        f"diffusers: an original through its stock class, a student as {FLASH_CLASS} (AutoModel, trust_remote_code).",
        "ComfyUI: a file goes through its own loader, a node is the folder for custom_nodes.",
        *findings.reasons,
    )
    table = to_markdown(TableData(title, columns, tuple(findings.rows)))
    return table + "\n" + "\n".join(f"- {line}" for line in below)


@pytest.fixture(scope="module")
def findings() -> Iterator[Findings]:
    found = Findings()
    yield found
    print("", printed_table(found), sep="\n")


def exported(name: str, kind: Kind, folder: Path) -> Exported:
    """Make the toy, and of it what `kind` says, and write every target."""
    toy = TOYS[name]
    toy.write(folder / "vae")
    file = "vae"
    if kind == "student":
        if toy.vae != "vae":
            succeed("convert-ops vae --profile image --output images.safetensors", cwd=folder)
        succeed(f"prune {toy.vae} --ratio 0.75 --rule l1 --reconstruct none", cwd=folder)
        succeed("convert-ops pruned.safetensors --reconstruct none --output flash.safetensors", cwd=folder)
        file = "flash.safetensors"
    checkpoint = loaded(folder, file)
    targets = ["safetensors", "comfyui", "pt2", *([] if diffusers_obstacle(checkpoint) else ["diffusers"])]
    succeed(f"export {file} {' '.join(f'-t {target}' for target in targets)}", cwd=folder)
    decoder, statistics = checkpoint.require_decoder(), (checkpoint.latent_mean, checkpoint.latent_std)
    stem = Path(file).stem
    options = OnnxOptions(latent_mean=statistics[0], latent_std=statistics[1])
    export_onnx(decoder, folder / f"{stem}.onnx", options=options, kinds=("clip",))
    grid = (1 if toy.frames == 1 else GRID[0], *GRID[1:])
    latents = seeded_latents(decoder.spec, grid, seed=1, latent_mean=statistics[0], latent_std=statistics[1])
    normalized = seeded_latents(decoder.spec, grid, seed=1)
    return Exported(checkpoint, folder, stem, latents, normalized, decode(decoder, latents))


@pytest.mark.bench
@pytest.mark.parametrize("kind", ["original", "student"])
@pytest.mark.parametrize("name", CHOSEN)
@torch.no_grad()
def test_in_their_programs(name: str, kind: Kind, tmp_path: Path, findings: Findings) -> None:
    given = exported(name, kind, tmp_path)
    assert given.checkpoint.family == name
    cells: list[Cell] = []
    beyond: list[str] = []
    for target in TARGETS:
        try:
            frames, how = target.frames_of(given, findings)
        except Unavailable as missing:
            cells.append(missing.cell)
            findings.reasons[missing.reason] = None
            continue
        difference = share_of_range(frames, given.frames)
        shown = f"{difference:.1e}" if difference else "0"
        cells.append(f"{shown} ({how})" if how else shown)
        if not difference < target.bounds[kind]:
            beyond.append(f"{target.name}: {difference:.1e}, allowed {target.bounds[kind]:.0e}")
    print("", name, kind, *cells, sep=" | ", flush=True)  # a long run shows what it has
    findings.rows.append((name, kind, *cells))
    assert not beyond
