"""The six commands on small VAEs of every family, given as diffusers folders."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from flashvaed_cli.artifact.checkpoint import Checkpoint, load_checkpoint
from flashvaed_cli.artifact.foreign.layouts import to_foreign
from flashvaed_cli.decoders.modules.coder import Decoder, Encoder
from flashvaed_cli.decoders.predict.cost import total_gflop
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.decoders.spec.groups import channel_groups
from flashvaed_cli.decoders.spec.light import light_shape
from flashvaed_cli.families.layout import Layout
from flashvaed_cli.families.qwen_image.names import QWEN_DIFFUSERS, QWEN_ORIGINAL
from flashvaed_cli.families.qwen_image2.names import QWEN2_DIFFUSERS
from flashvaed_cli.families.registry import FAMILIES, get_family
from flashvaed_cli.families.wan21.names import WAN_DIFFUSERS
from flashvaed_cli.families.wan22.names import WAN22_DIFFUSERS
from flashvaed_cli.media.procedural import render_frames
from flashvaed_cli.surgery.respec import main_layers
from tests.commands import JUDGING, invoke, read_report, succeed
from tests.hunyuan15_toy import hunyuan15_config, random_hunyuan15
from tests.hunyuan_toy import hunyuan_config, random_hunyuan
from tests.kl_toys import flux2_config, kl_config, random_flux2, random_kl
from tests.leanvae_toy import write_leanvae
from tests.ltx_configs import ltx_config, random_ltx
from tests.seedvr2_toy import seedvr2_tensors
from tests.svd_toy import random_svd, svd_config
from tests.toy import fill_, write_toy_clip

COMMANDS = ("analyze", "prune", "convert-ops", "distill", "eval", "export")


def random_tensors(layout: Layout) -> dict[str, torch.Tensor]:
    """A VAE of base width 4 with random weights, in a foreign layout."""
    family = get_family(layout.family)
    tensors: dict[str, torch.Tensor] = {}
    latent_width = family.latent_width
    for coder in (Decoder(family.decoder_spec(4, latent_width)), Encoder(family.encoder_spec(4, latent_width))):
        fill_(coder.requires_grad_(False))
        tensors |= {name: value.clone() for name, value in to_foreign(coder.state_dict(), coder.spec, layout).items()}
    return tensors


def loaded(folder: Path, name: str) -> Checkpoint:
    return load_checkpoint(folder / name, builtins={})


def write_wan(path: Path, layout: Layout, **config: object) -> None:
    """A VAE of base width 4 with random weights, as a diffusers folder."""
    family = get_family(layout.family)
    path.mkdir()
    save_file(random_tensors(layout), path / "diffusion_pytorch_model.safetensors")
    statistics = {"latents_mean": family.latent_mean, "latents_std": family.latent_std, "z_dim": family.latent_width}
    written = {"_class_name": layout.config_class, "base_dim": 4, **statistics, **config}
    (path / "config.json").write_text(json.dumps(written))


def write_ltx(path: Path, version: str) -> None:
    pytest.importorskip("diffusers", reason="it writes the toys of LTX")
    random_ltx(ltx_config(version, 4, 4)).save_pretrained(path)  # type: ignore[operator]


def write_kl(path: Path, name: str) -> None:
    pytest.importorskip("diffusers", reason="it writes the toys of Stable Diffusion's VAE")
    random_kl(kl_config(name)).save_pretrained(path)  # type: ignore[operator]


def write_hunyuan(path: Path) -> None:
    pytest.importorskip("diffusers", reason="it writes the toy of HunyuanVideo")
    random_hunyuan(hunyuan_config()).save_pretrained(path)  # type: ignore[operator]


def write_hunyuan15(path: Path) -> None:
    pytest.importorskip("diffusers", reason="it writes the toy of HunyuanVideo 1.5")
    random_hunyuan15(hunyuan15_config()).save_pretrained(path)  # type: ignore[operator]


def write_svd(path: Path) -> None:
    pytest.importorskip("diffusers", reason="it writes the toy of Stable Video Diffusion's VAE")
    random_svd(svd_config()).save_pretrained(path)  # type: ignore[operator]


def write_seedvr2(path: Path) -> None:
    path.mkdir()
    save_file(seedvr2_tensors(), path / "ema_vae.safetensors")
    (path / "config.json").write_text(json.dumps({"norm_num_groups": 4}))


def write_flux2(path: Path) -> None:
    pytest.importorskip("diffusers", reason="it writes the toy of FLUX.2's VAE")
    random_flux2(flux2_config()).save_pretrained(path)  # type: ignore[operator]


def write_images(folder: Path, side: int) -> None:
    for index, frame in enumerate(render_frames(2, side, side + 8)):
        pixels = ((frame + 1) * 127.5).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"image{index}.png")


@dataclass(frozen=True)
class Toy:
    """A family's VAE and clips, both tiny, and what its commands are told.

    Attributes:
        frames, side: of the clip, which is cut no further; images where there is one frame.
        is_still: the family is one of single images, and needs no conversion to that.
        prune: how much to keep.
        budget: seconds for the latency of narrower widths.
        grid: of latents, to compare costs on.
    """

    write: Callable[[Path], None]
    frames: int
    side: int
    is_still: bool = False
    prune: str = "--ratio 0.5"
    budget: int = 0
    grid: tuple[int, int, int] = (2, 3, 3)

    @property
    def data(self) -> str:
        return "--data clip.mp4" if self.frames > 1 else "--data image0.png --data image1.png"

    @property
    def vae(self) -> str:
        return "vae" if self.frames > 1 or self.is_still else "images.safetensors"

    def sentences(self) -> dict[str, str]:
        """The six commands and their words."""
        cut = f"{self.data} --num-frames {self.frames} --crop-size {self.side}"
        calibration = f"{cut} --num-calibration-clips 2"
        latency = (
            f"--latency-frames {self.frames} --latency-side 64 --num-latency-rounds 1 --width-latency-s {self.budget}"
        )
        return {
            "analyze": f"{self.vae} {calibration} {latency}",
            "prune": f"{self.vae} {self.prune} {calibration}",
            "convert-ops": f"{calibration} --num-separable-iterations 1",
            "distill": f"{cut} --phase 3 --num-steps 2 --num-clips 2 --batch-size 1 --loss-weight lpips=0",
            "eval": f"{self.data} {JUDGING}",
            "export": "--target safetensors",
        }


TOYS = {
    "wan2.1": Toy(lambda path: write_wan(path, WAN_DIFFUSERS), 5, 48),
    "wan2.2": Toy(
        lambda path: write_wan(path, WAN22_DIFFUSERS, is_residual=True, patch_size=2, decoder_base_dim=4),
        5,
        48,
        prune="--target-gflops 0.05",
        budget=1,
    ),
    "qwen-image": Toy(lambda path: write_wan(path, QWEN_DIFFUSERS), 1, 48, grid=(1, 3, 3)),
    "qwen-image-2": Toy(lambda path: write_wan(path, QWEN2_DIFFUSERS), 1, 80, is_still=True, grid=(1, 3, 3)),
    "ltx-video-0.9.0": Toy(lambda path: write_ltx(path, "0.9.0"), 9, 96),
    "ltx-video-0.9.1": Toy(lambda path: write_ltx(path, "0.9.1"), 9, 96),
    "ltx-video-0.9.5": Toy(lambda path: write_ltx(path, "0.9.5"), 9, 96),
    "ltx-2": Toy(lambda path: write_ltx(path, "2"), 9, 96),
    "ltx-2.3": Toy(lambda path: write_ltx(path, "2.3"), 9, 96),
    "stable-diffusion": Toy(
        lambda path: write_kl(path, "stable-diffusion"), 3, 48, prune="--target-gflops 0.25", budget=1
    ),
    "sdxl": Toy(lambda path: write_kl(path, "sdxl"), 3, 48),
    "sd3": Toy(lambda path: write_kl(path, "sd3"), 3, 48),
    "stable-video-diffusion": Toy(write_svd, 3, 48),
    "flux.1": Toy(lambda path: write_kl(path, "flux.1"), 1, 48, is_still=True),
    "hunyuanvideo": Toy(write_hunyuan, 9, 48),
    "hunyuanvideo-1.5": Toy(write_hunyuan15, 9, 64),
    "seedvr2": Toy(write_seedvr2, 9, 48),
    "flux.2": Toy(write_flux2, 1, 48, is_still=True),
}


def test_every_family_has_a_toy() -> None:
    """LeanVAE, of which nothing is converted, has a test of its own."""
    assert set(TOYS) | {"leanvae"} == set(FAMILIES)


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    """Family x command in seconds, printed at the end: pytest -s -p no:xdist tests/integration/test_families.py."""
    rows = Table("family", *COMMANDS, title="seconds of each command on a toy VAE")
    yield rows
    Console(width=110).print(rows)


def write_inputs(toy: Toy, folder: Path) -> None:
    """The VAE, made for single images if need be, and clips or images."""
    toy.write(folder / "vae")
    if toy.frames == 1:
        write_images(folder, toy.side)
    else:
        write_toy_clip(folder / "clip.mp4", toy.frames, toy.side, toy.side)
    if toy.vae != "vae":
        succeed("convert-ops vae --profile image --output images.safetensors", cwd=folder)


@pytest.mark.parametrize("name", TOYS)
def test_a_light_student(name: str, tmp_path: Path) -> None:
    toy = TOYS[name]
    write_inputs(toy, tmp_path)
    words = f"{toy.sentences()['distill']} --loss-weight feature=0 --student tae --student-width 4"
    succeed(f"distill {toy.vae} {words}", cwd=tmp_path)
    vae, student = (loaded(tmp_path, place) for place in (toy.vae, "flash.safetensors"))
    spec, original = student.require_decoder().spec, vae.require_decoder().spec
    assert (student.family, light_shape(spec), spec.still) == (name, "tae", original.still)
    assert student.latent_mean == vae.latent_mean and student.encoder is None
    succeed(f"eval {toy.sentences()['eval']}", cwd=tmp_path)
    assert {row["num_frames"] for row in read_report(tmp_path / "report")["clips"]} == {toy.frames}
    succeed("export --target safetensors", cwd=tmp_path)
    assert loaded(tmp_path, "export/flash.safetensors").require_decoder().spec == spec


@pytest.mark.parametrize("name", TOYS)
def test_six_commands(name: str, tmp_path: Path, table: Table) -> None:
    toy, family = TOYS[name], get_family(name)
    write_inputs(toy, tmp_path)
    printed, seconds = {}, []
    for command, words in toy.sentences().items():
        start = time.perf_counter()
        printed[command] = succeed(f"{command} {words}", cwd=tmp_path)
        seconds.append(f"{time.perf_counter() - start:.1f}")
    table.add_row(name, *seconds)
    vae, original, flash = (loaded(tmp_path, place) for place in ("vae", toy.vae, "flash.safetensors"))
    assert (vae.family, flash.family) == (name, name)
    assert flash.latent_mean == vae.latent_mean
    before, after = original.require_decoder().spec, flash.require_decoder().spec
    for stage, operator in family.paper_operators.items():
        layers = [block.layers[one] for block, main in main_layers(after.stage(stage)).values() for one in main]
        assert {layer.operator for layer in layers if layer.kernel != (1, 1, 1)} == {operator}
    old, new = ({group.name: group.width for group in channel_groups(spec)} for spec in (before, after))
    assert {name.split(".")[0] for name in new if new[name] < old.get(name, 0)} == set(family.shallow_stages)
    assert total_gflop(after, toy.grid) < 0.6 * total_gflop(before, toy.grid)
    assert {row["num_frames"] for row in read_report(tmp_path / "report")["clips"]} == {toy.frames}
    again = loaded(tmp_path, "export/flash.safetensors")
    assert again.family == name and again.require_decoder().spec == after
    assert "sees frames ahead" not in str(printed["export"])  # nothing streams without being asked
    if name == "wan2.2":
        assert "up2.3.bypass" in str(printed["prune"]) and printed["prune"]["budget"]
        assert (after.patch, after.spatial_factor) == (2, 16) and dict(after.layers())[
            "up2.3.bypass"
        ].operator == "pointwise"
    if name == "ltx-video-0.9.5":
        assert not after.is_causal and after.decode_timestep == 0.05


@pytest.mark.parametrize("latent_width", [4, 16])
def test_commands_on_leanvae(latent_width: int, tmp_path: Path) -> None:
    """Five commands work on it; there is nothing to convert, and the sixth says so."""
    write_leanvae(tmp_path / "vae.ckpt", latent_width)
    write_toy_clip(tmp_path / "clip.mp4", 9, 48, 48)
    toy = Toy(lambda _: None, 9, 48)
    words = toy.sentences()
    succeed(f"analyze {words['analyze'].replace('vae', 'vae.ckpt', 1)}", cwd=tmp_path)
    pruned = succeed(f"prune {words['prune'].replace('vae', 'vae.ckpt', 1)}", cwd=tmp_path)
    assert {"bottleneck.0.analysis.0.0.inner", "fusion.1.inner", "branches.0.inner1"} <= set(str(pruned).split("'"))
    refused = {
        "": "no dense residual blocks to convert",
        "--profile exact": "every layer has its fastest exact operator",
        "--profile image": "no profile of single images for leanvae",
    }
    for profile, why in refused.items():
        converted = invoke(f"convert-ops pruned.safetensors {profile} {words['convert-ops']}", cwd=tmp_path)
        assert converted.exit_code == 2 and why in " ".join(converted.stderr.split())
    succeed(f"distill pruned.safetensors --output flash.safetensors {words['distill']}", cwd=tmp_path)
    succeed(f"eval {words['eval']}", cwd=tmp_path)
    succeed("export --target safetensors", cwd=tmp_path)
    before, after = loaded(tmp_path, "vae.ckpt"), loaded(tmp_path, "flash.safetensors")
    old, new = (one.require_decoder().spec for one in (before, after))
    assert total_gflop(new, toy.grid) < 0.75 * total_gflop(old, toy.grid)  # its head, which stays, is a fifth
    assert {group.name for group in channel_groups(old)} == {group.name for group in channel_groups(new)}
    again = loaded(tmp_path, "export/flash.safetensors")
    assert again.family == "leanvae" and again.require_decoder().spec == new
    latents = torch.randn(1, latent_width, 3, 2, 3)
    assert torch.equal(decode(again.require_decoder(), latents), decode(after.require_decoder(), latents))
    folder = invoke("export --target diffusers --output folder", cwd=tmp_path)
    assert folder.exit_code == 2 and "diffusers: it has no class for leanvae" in folder.stderr


def test_images_of_a_video_decoder(tmp_path: Path) -> None:
    write_wan(tmp_path / "vae", QWEN_DIFFUSERS)
    converted = succeed("convert-ops vae --profile image --output images.safetensors", cwd=tmp_path)
    assert converted["max_difference_of_range"] < 1e-6
    still = loaded(tmp_path, "images.safetensors").require_decoder()
    assert still.spec.still and {layer.kernel[0] for _, layer in still.spec.layers()} == {1}
    latents = torch.randn(1, 16, 1, 3, 4)
    difference = decode(still, latents) - decode(loaded(tmp_path, "vae").require_decoder(), latents)
    assert difference.abs().max() < 1e-5
    refused = invoke("eval images.safetensors --speed --frames 9 --sizes 32x32", cwd=tmp_path)
    assert refused.exit_code == 2 and "decodes single images; give --frames 1" in refused.stderr


def test_a_bare_file_of_two_families_is_said_to_be_so(tmp_path: Path) -> None:
    save_file(random_tensors(QWEN_ORIGINAL), tmp_path / "qwen.safetensors")
    words = "convert-ops qwen.safetensors --profile image"
    told = invoke(f"{words} --output a.safetensors", cwd=tmp_path)
    assert told.exit_code == 0 and "taken as wan2.1 (--family qwen-image" in " ".join(told.stderr.split())
    quiet = invoke(f"{words} --family qwen-image --output b.safetensors", cwd=tmp_path)
    assert quiet.exit_code == 0 and "taken as" not in quiet.stderr
    assert [loaded(tmp_path, f"{name}.safetensors").family for name in "ab"] == ["wan2.1", "qwen-image"]
    wrong = invoke(f"{words} --family wan2.2 --force", cwd=tmp_path)
    assert wrong.exit_code == 2 and "wan2.2-original: no tensor named" in " ".join(wrong.stderr.split())
    assert pytest.approx(loaded(tmp_path, "a.safetensors").latent_mean) == loaded(tmp_path, "b.safetensors").latent_mean
