"""Well-formed inputs to start from, tiny: every layout that is read, artifacts, latents, recipes, a latent cache."""

from __future__ import annotations

import io
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flashvaed_cli.artifact.foreign.writing import to_program
from flashvaed_cli.artifact.header import ArtifactHeader, dump_header
from flashvaed_cli.decoders.modules.coder import Coder, Decoder, Encoder
from flashvaed_cli.families.registry import LAYOUTS, get_family
from flashvaed_cli.recipe import shipped_recipes
from tests.leanvae_toy import leanvae_arguments, leanvae_weights
from tests.light_toy import ALL_SHAPES, filled, light_toy_spec
from tests.toy import DECODER_SPECS, WAN22_SPECS, fill_, write_toy_clip
from tests.unit.artifact.test_damaged_layers import taesd_tensors
from tests.unit.artifact.test_taehv import tensors_of

Document = dict[str, Any]

_LATENT_WIDTHS = {"stable-diffusion": 4, "sdxl": 4, "sd3": 16, "flux.1": 16}
SPECS = {
    **DECODER_SPECS,
    **{f"wan2.2 {name}": spec for name, spec in WAN22_SPECS.items()},
    **{shape: light_toy_spec(shape) for shape in ALL_SHAPES},
}
"""Decoders that artifacts hold."""


@cache
def artifact(name: str) -> tuple[Document, dict[str, Tensor]]:
    """The header of an artifact, and its tensors."""
    coder = filled(SPECS[name])
    width = coder.spec.latent_width
    header = ArtifactHeader(
        kind="decoder",
        family=coder.spec.family,
        decoder=coder.spec,
        latent_mean=(0.1,) * width,
        latent_std=(1.5,) * width,
        recipe={"ratio": 0.5},
        measured={"held_out": {"psnr_db": 30.0}},
    )
    tensors = {f"decoder.{name}": value.clone() for name, value in coder.state_dict().items()}
    return json.loads(dump_header(header)), tensors


@cache
def foreign(name: str) -> tuple[Document | None, dict[str, Tensor]]:
    """The configuration beside the weights, if there is one, and the tensors; `name` is of `FOREIGN`."""
    if name == "taehv":
        return None, tensors_of(16, 1)
    if name == "taesd":
        return None, taesd_tensors()
    if name == "taesd folder":
        tensors = {f"decoder.layers.{int(n) - 1}.{rest}": tensor for n, rest, tensor in _numbered(taesd_tensors())}
        return {"_class_name": "AutoencoderTiny", "latent_channels": 4, "scaling_factor": 1.0}, tensors
    layout = LAYOUTS[name]
    if layout.family == "leanvae":
        return None, leanvae_weights(4)
    family = get_family(layout.family)
    base_width = 8 if layout.family == "hunyuanvideo-1.5" else 4  # the least that its averages divide
    coders: list[Coder] = [
        Decoder(family.decoder_spec(base_width, family.latent_width)),
        Encoder(family.encoder_spec(base_width, family.latent_width)),
    ]
    for coder in coders:
        fill_(coder.requires_grad_(False))
    states = [({key: value.detach() for key, value in one.state_dict().items()}, one.spec) for one in coders]
    tensors = {key: value.contiguous() for key, value in to_program(states, layout, ((), ())).items()}
    config: Document = {"_class_name": layout.config_class} if layout.config_class else {}
    config |= family.described(coders[0].spec)
    if layout.statistics_config is not None:
        config |= layout.statistics_config(family.latent_mean, family.latent_std)
    elif family.latent_mean:
        config |= {"latents_mean": list(family.latent_mean), "latents_std": list(family.latent_std)}
    return config, tensors


def _numbered(tensors: dict[str, Tensor]) -> list[tuple[str, str, Tensor]]:
    return [(*name.split(".", 1), tensor) for name, tensor in tensors.items()]  # type: ignore[misc]


FOREIGN = (*LAYOUTS, "taehv", "taesd", "taesd folder")
FAMILY_OF = {
    "taehv": "wan2.1",
    "taesd": "sdxl",
    "taesd folder": "sdxl",
    **{n: one.family for n, one in LAYOUTS.items()},
}


def pickled(content: object) -> bytes:
    """As `torch.save` writes it."""
    written = io.BytesIO()
    torch.save(content, written)
    return written.getvalue()


@cache
def pytorch_files() -> tuple[bytes, ...]:
    """State dicts in the wrappers that trainers use, latents alone and by name."""
    few = dict(list(foreign("taehv")[1].items())[:6])
    return (
        pickled({"args": leanvae_arguments(4), "state_dict": leanvae_weights(4)}),
        pickled({"model": few, "ema": few, "step": 3, "lr": 1e-3, "names": ["a", ("b",)]}),
        pickled({"state_dict": {f"module.{name}": torch.nn.Parameter(value) for name, value in few.items()}}),
        pickled(torch.ones(1, 4, 2, 3, 3)),
        pickled({"latents": torch.ones(4, 1, 3, 3, dtype=torch.bfloat16), "prompt": "x"}),
        pickled([torch.ones(4, 1, 2, 2), torch.ones(4, 1, 2, 2)]),
    )


@cache
def recipes() -> tuple[str, ...]:
    """The recipes that ship."""
    return tuple(path.read_text(encoding="utf-8") for path in shipped_recipes().values())


CORPUS = Path(__file__).with_name("corpus.json")
"""Texts that were worth a look once: YAML, JSON and words of command lines."""


@cache
def videos() -> tuple[tuple[str, bytes], ...]:
    """Names and contents of a short video, a picture and an animated picture."""
    with tempfile.TemporaryDirectory() as folder:
        video = write_toy_clip(Path(folder) / "a.mp4", num_frames=9).read_bytes()
    cards = [Image.new("RGB", (24, 16), (red, 30, 60)) for red in (0, 120, 240)]
    picture, animation = io.BytesIO(), io.BytesIO()
    cards[0].save(picture, format="PNG")
    cards[0].save(animation, format="GIF", save_all=True, append_images=cards[1:])
    return ("a.mp4", video), ("a.png", picture.getvalue()), ("a.gif", animation.getvalue())
