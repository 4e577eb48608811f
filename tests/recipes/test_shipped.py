"""Every shipped recipe parses, each of its sections resolves to settings that its file chain supports, and those that
are for families of decoders give each of them its layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashvaed_cli.artifact.checkpoint import load_checkpoint, save_checkpoint
from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.decoders.spec.blocks import ResBlockSpec
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.decoders.spec.groups import channel_groups
from flashvaed_cli.decoders.variants.still import still_decoder
from flashvaed_cli.families.registry import get_family
from flashvaed_cli.recipe import COMMAND_RECIPES, DistillRecipe, load_recipe, resolve
from tests.commands import invoke, succeed
from tests.ltx_toy import ltx_decoder

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))


def test_the_folder_is_not_empty() -> None:
    assert {path.stem for path in RECIPES} >= {"demo", "fast", "paper", "wan2.1", "wan2.2", "qwen-image"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_section_resolves(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.description
    for section in recipe.sections:
        settings = resolve(COMMAND_RECIPES[section.command], recipe, step=section.name)
        for field, value in section.settings.items():
            assert getattr(settings, field) is not None or value == 0, (field, value)  # 0 leaves something out


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_file_that_a_section_reads_is_written_before_it(path: Path) -> None:
    written = {"builtin:tiny-wan"}
    recipe = load_recipe(path)
    for section in recipe.sections:
        settings = resolve(COMMAND_RECIPES[section.command], recipe, step=section.name)
        source = getattr(settings, "input", None)
        if source is None:
            source = next(place for place in settings.default_inputs if place in written)
        assert source in written or source.startswith("hf://")
        written.add(getattr(settings, "output"))  # noqa: B009


def test_the_paper_recipe_is_the_papers_order() -> None:
    recipe = load_recipe(next(path for path in RECIPES if path.stem == "paper"))
    order = [(section.command, section.name) for section in recipe.sections]
    assert order == [
        ("convert-ops", None),
        ("distill", "phase1"),
        ("distill", "phase2"),
        ("prune", None),
        ("distill", "phase3"),
    ]
    phases = [resolve(DistillRecipe, recipe, step=name).schedule()[0].phase for name in ("phase1", "phase2", "phase3")]
    assert phases == [1, 2, 3]


LATENT_WIDTH = 4
LAYOUTS = {
    "ltx": ("ltx-video-0.9.0", "ltx-video-0.9.1", "ltx-video-0.9.5", "ltx-2", "ltx-2.3"),
    "wan2.1": ("wan2.1",),
    "wan2.2": ("wan2.2",),
    "qwen-image": ("qwen-image", "qwen-image-2"),
}
"""The recipes of real VAEs, and the families that each is for."""


def write_vae(folder: Path, family: str, *, still: bool = False) -> DecoderSpec:
    """`vae.safetensors`, a toy of a family, and `latents.safetensors` to calibrate on."""
    decoder = ltx_decoder(get_family(family).decoder_spec(8, LATENT_WIDTH))
    decoder = still_decoder(decoder) if still and not decoder.spec.still else decoder
    header = ArtifactHeader(kind="vae", family=family, latent_mean=(), latent_std=())
    save_checkpoint(folder / "vae.safetensors", header, decoder=decoder)
    num_latents = 1 if decoder.spec.still else 2
    latents = torch.randn(LATENT_WIDTH, num_latents, 3, 4, generator=torch.Generator().manual_seed(0))
    save_file({"latents": latents}, folder / "latents.safetensors")
    return decoder.spec


@pytest.mark.parametrize(("recipe", "name"), [(recipe, name) for recipe in LAYOUTS for name in LAYOUTS[recipe]])
def test_a_recipe_gives_every_family_that_it_is_for_its_layout(recipe: str, name: str, tmp_path: Path) -> None:
    family = get_family(name)
    before = write_vae(tmp_path, name, still=recipe == "qwen-image")
    words = "--data latents.safetensors --latent-scale raw --reconstruct none"
    succeed(f"prune vae.safetensors --recipe {recipe} {words}", cwd=tmp_path)
    step = "--step operators" if recipe == "qwen-image" else ""
    succeed(f"convert-ops --recipe {recipe} {step} {words}", cwd=tmp_path)
    after = load_checkpoint(tmp_path / "converted.safetensors", builtins={}).require_decoder().spec
    widths = {group.name: group.width for group in channel_groups(after)}
    for group in channel_groups(before):
        ratio = family.paper_keep_ratio if group.stage in family.shallow_stages else 1
        assert widths[group.name] == round(ratio * group.width)
    for stage, operator in family.paper_operators.items():
        blocks = [block for block in after.stage(stage).blocks if isinstance(block, ResBlockSpec)]
        assert {layer.operator for block in blocks for layer in (block.conv1, block.conv2)} == {operator}


OWN_RECIPE = """steps:
  - prune:
      stage_keep_ratios: {up2: 0.25,
                          up3: 0.25}
  - distill: {phase: 2, group_keep_ratios: {up3.stream: 0.5}}
  - convert-ops: {operators: {up3: frame2d}}
"""


def test_a_stage_of_a_recipe_that_the_decoder_lacks_is_named_with_its_place(tmp_path: Path) -> None:
    write_vae(tmp_path, "ltx-video-0.9.5")
    (tmp_path / "own.yaml").write_text(OWN_RECIPE, encoding="utf-8")
    data = "--data latents.safetensors --latent-scale raw"
    for words, place in (
        ("prune vae.safetensors", "own.yaml, line 4: prune.stage_keep_ratios.up3: this decoder has no stage 'up3'"),
        (
            "distill vae.safetensors --loss-weight lpips=0",
            "own.yaml, line 5: distill.group_keep_ratios.up3.stream: this decoder has no channel group 'up3.stream'",
        ),
        ("convert-ops vae.safetensors", "own.yaml, line 6: convert-ops.operators.up3: this decoder has no stage 'up3'"),
    ):
        refused = invoke(f"{words} {data} --recipe own.yaml -q", cwd=tmp_path)
        assert refused.exit_code == 2 and place in refused.stderr and "change it there" in refused.stderr
        if not words.startswith("convert-ops"):
            assert "--ratio" in refused.stderr and "up1 and up2, the stages that are pruned" in refused.stderr
    flag = invoke(f"prune vae.safetensors {data} --recipe own.yaml --ratio up3=0.5 -q", cwd=tmp_path)
    assert "--ratio up3=0.5: this decoder has no stage 'up3', but mid, up0, up1, up2: give one of these" in flag.stderr
    succeed(f"prune vae.safetensors {data} --recipe own.yaml --ratio 0.5 --reconstruct none", cwd=tmp_path)
