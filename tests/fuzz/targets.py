"""What opens input from elsewhere. Each target takes what hypothesis draws; a user's error or success is fine.

A target is a function of `draw` and a folder. It builds one input, has the package open it, and passes on every error
but `FlashVaedError`.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.main
import yaml
from hypothesis import HealthCheck
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from typer.testing import CliRunner

from flashvaed_cli.artifact.checkpoint import load_checkpoint
from flashvaed_cli.artifact.store import content_sha256, read_header
from flashvaed_cli.cli.app import app
from flashvaed_cli.errors import FlashVaedError
from flashvaed_cli.media.cache_key import CacheKey, FileStamp
from flashvaed_cli.media.clips import load_clip, plan_clips
from flashvaed_cli.media.cuts import Bucket, ClipSize, CutSettings
from flashvaed_cli.media.latent_cache import CacheWriter, claim_cache, read_cache, read_key
from flashvaed_cli.media.latent_files import load_latents
from flashvaed_cli.ownership import has_own_header
from flashvaed_cli.recipe import COMMAND_RECIPES, load_recipe, resolve
from flashvaed_cli.untrusted.pytorch_file import load_pytorch
from tests.commands import put_in_place_of_stages
from tests.fuzz import seeds
from tests.fuzz.mutations import ODD_VALUES, Draw, archives, blobs, documents, state_dicts

Target = Callable[[Draw, Path], None]

_WIDTHS = st.sampled_from([None, 4, 16])
_LATENT_SHAPES = st.lists(st.integers(0, 5), max_size=6)


def artifact_headers(draw: Draw, folder: Path) -> None:
    """The JSON in an artifact's metadata, and tensors that may not fit it."""
    header, tensors = seeds.artifact(draw(st.sampled_from(sorted(seeds.SPECS))))
    if draw(st.integers(0, 4)):
        header = draw(documents(header))
    if draw(st.integers(0, 4)) == 0:
        tensors = draw(state_dicts(tensors))
    text = json.dumps(header)
    if draw(st.integers(0, 9)) == 0:
        text = draw(blobs(text.encode())).decode("utf-8", "replace")
    path = folder / "a.safetensors"
    save_file(tensors, path, metadata={"flashvaed": text})
    _open_checkpoint(path, None)
    with suppress(FlashVaedError):
        read_header(path)
        content_sha256(path)


def safetensors_files(draw: Draw, folder: Path) -> None:
    """The container: its length, its index, and bytes that lack or are too many."""
    tensors = {"latents": torch.ones(1, 4, 2, 2, 2), "b": torch.zeros(3, dtype=torch.float16)}
    data = save(tensors, metadata={"format": "pt"})
    length = struct.unpack("<Q", data[:8])[0]
    index, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    if draw(st.integers(0, 3)) == 0:
        data = draw(blobs(data))
    else:
        text = json.dumps(draw(documents(index))).encode()
        stated = draw(st.sampled_from([len(text), len(text), len(text), 0, len(text) + 1, 2**40, 2**64 - 1]))
        data = struct.pack("<Q", stated) + text + rest[: draw(st.sampled_from([len(rest), len(rest), 5]))]
    path = folder / f"s{draw(st.sampled_from(['.safetensors', '.latent', '.pt', '.ckpt']))}"
    path.write_bytes(data)
    has_own_header(path)
    _open_checkpoint(path, draw(st.sampled_from([None, "sdxl", "wan2.1"])))
    _open_latents(draw, path)


def foreign_checkpoints(draw: Draw, folder: Path) -> None:
    """Tensors and configurations of every layout that is read, alone and in a folder."""
    name = draw(st.sampled_from(seeds.FOREIGN))
    config, tensors = seeds.foreign(name)
    if draw(st.integers(0, 2)):
        tensors = draw(state_dicts(tensors))
    if config is not None and draw(st.integers(0, 1)):
        config = draw(documents(config))
    place = folder / "vae"
    place.mkdir(exist_ok=True)
    metadata = {}
    if draw(st.integers(0, 5)) == 0:
        metadata = {"config": json.dumps(config), "latents_mean": "[1]", "decode_timestep": str(draw(ODD_VALUES))[:99]}
    content = {key: value.clone().contiguous() for key, value in tensors.items()}
    save_file(content, place / "diffusion_pytorch_model.safetensors", metadata=metadata)
    if config is not None and draw(st.integers(0, 5)):
        (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    family = draw(st.sampled_from([None, seeds.FAMILY_OF[name], seeds.FAMILY_OF[name], "ltx", "leanvae"]))
    is_folder = (place / "config.json").exists()
    _open_checkpoint(place if is_folder else place / "diffusion_pytorch_model.safetensors", family)


def pytorch_files(draw: Draw, folder: Path) -> None:
    """Archives of `torch.save`: their pickles, operation by operation, and structures of plain values and tensors."""
    if draw(st.integers(0, 2)):
        data = draw(archives(draw(st.sampled_from(seeds.pytorch_files()))))
    else:
        plain: Any = {"args": {"a": [1, {"b": None}]}, "state_dict": {"x": "TENSOR"}, "epoch": 3, "l": ["TENSOR", 2]}
        data = seeds.pickled(_with_tensors(draw(documents(plain)), draw))
    path = folder / f"p{draw(st.sampled_from(['.pt', '.pth', '.ckpt', '.bin']))}"
    path.write_bytes(data)
    with suppress(FlashVaedError):
        load_pytorch(path)
    _open_checkpoint(path, draw(st.sampled_from([None, "leanvae", "wan2.1"])))
    _open_latents(draw, path)


def _with_tensors(value: Any, draw: Draw) -> Any:
    if isinstance(value, dict):
        return {key: _with_tensors(item, draw) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_tensors(item, draw) for item in value]
    return torch.ones(draw(_LATENT_SHAPES)) if value == "TENSOR" else value


def latent_files(draw: Draw, folder: Path) -> None:
    """Latents of any axes and number format, in each kind of file."""
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.bool]))
    tensor = torch.ones(draw(_LATENT_SHAPES)).to(dtype)
    name = draw(st.sampled_from(["latents", "samples", "z", "x", "latent_format_version_0"]))
    suffix = draw(st.sampled_from([".safetensors", ".latent", ".pt", ".npy"]))
    path = folder / f"l{suffix}"
    if suffix == ".npy":
        written = io.BytesIO()
        np.save(written, tensor.float().numpy().astype(draw(st.sampled_from(["f4", ">f8", "f2", "i2", "c8", "U3"]))))
        data = written.getvalue()
        path.write_bytes(draw(blobs(data)) if draw(st.booleans()) else data)
    elif suffix == ".pt":
        items = {name: tensor, "other": torch.ones(1)}
        path.write_bytes(seeds.pickled(draw(st.sampled_from([tensor, [tensor, tensor], items, (), {"a": [tensor]}]))))
    else:
        save_file({name: tensor, "other": torch.ones(draw(_LATENT_SHAPES))}, path)
    _open_latents(draw, path)


def recipes(draw: Draw, folder: Path) -> None:
    """YAML as text and as structure, then every section against its command's model."""
    text = draw(st.sampled_from((*seeds.recipes(), *json.loads(seeds.CORPUS.read_text(encoding="utf-8"))["recipes"])))
    if draw(st.booleans()):
        document = yaml.safe_load(text) if text in seeds.recipes() else {"steps": [{"prune": {"ratio": 0.5}}]}
        text = yaml.safe_dump(draw(documents(document)), allow_unicode=True)
    elif draw(st.booleans()):
        text = draw(blobs(text.encode())).decode("utf-8", "replace")
    path = folder / "r.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    with suppress(FlashVaedError):
        recipe = load_recipe(path)
        for section in recipe.sections:
            with suppress(FlashVaedError):
                resolve(COMMAND_RECIPES[section.command], recipe, step=section.name)


def latent_caches(draw: Draw, folder: Path) -> None:
    """The key, the index and a shard of `--cache-latents`; what is damaged is made again."""
    cache = folder / "cache"
    cut = CutSettings(buckets=(Bucket(5, 32, None),), exact=False, num_clips=2, max_side=None, seed=0)
    key = CacheKey(vae="0" * 64, files=(FileStamp("/clip.mp4", 9, 8),), latent_scale=None, cut=cut, dtype="float32")
    claim_cache(cache, key)
    with CacheWriter(cache, key, _ignore) as writer:
        writer.add(0, torch.ones(4, 2, 3, 3))
        writer.finish({"a.mp4": "broken"})
    for name in draw(st.lists(st.sampled_from(["key.json", "index.json", "shard-00000.safetensors"]), max_size=2)):
        data = (cache / name).read_bytes()
        if name.endswith(".json") and draw(st.integers(0, 3)):
            with suppress(ValueError):
                data = json.dumps(draw(documents(json.loads(data)))).encode()
        else:
            data = draw(blobs(data))
        (cache / name).write_bytes(data)
    with suppress(FlashVaedError):
        found = read_key(cache)
        if found is not None:
            claim_cache(cache, key)
            complete = read_cache(cache, key, _ignore)
            with CacheWriter(cache, key, _ignore) as writer:
                writer.finish({})
            if complete is not None and 0 in complete.sizes:
                complete.cut(0, ClipSize(1, 2, 2))


def videos(draw: Draw, folder: Path) -> None:
    """Containers and pictures with damaged bytes: planned, then loaded."""
    name, data = draw(st.sampled_from(seeds.videos()))
    path = folder / name
    path.write_bytes(draw(blobs(data)))
    with suppress(FlashVaedError):
        requests, _ = plan_clips(
            [path],
            num_clips=draw(st.integers(1, 2)),
            num_frames=draw(st.sampled_from([1, 5])),
            max_side=draw(st.sampled_from([None, 16])),
            crop_size=draw(st.sampled_from([None, (16, 16), (64, 8)])),
            seed=draw(st.integers(0, 3)),
        )
        for request in requests:
            clip = load_clip(request)
            assert clip.dim() == 4 and clip.numel() and bool(torch.isfinite(clip).all())


def command_lines(draw: Draw, folder: Path) -> None:
    """Words of command lines: flags of each command and of others, values of the wrong kind, files that are none."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    name = draw(st.sampled_from(sorted(set(commands) - {"decode", "run"})))
    flags = [flag for parameter in commands[name].params for flag in parameter.opts if flag.startswith("-")]
    words = json.loads(seeds.CORPUS.read_text(encoding="utf-8"))["words"]
    value = st.one_of(st.sampled_from(words), ODD_VALUES.map(lambda one: str(one)[:80]), st.text(max_size=6))
    argv = [name]
    for _ in range(draw(st.integers(0, 5))):
        argv += [draw(st.sampled_from([*flags, "--nonsense", "--ratio"]))] * draw(st.integers(0, 1))
        argv += [draw(value).replace("\x00", "")] * draw(st.integers(0, 1))
    (folder / "odd.yaml").write_text("prune: {keep_ratio: 0.5}\nx: [", encoding="utf-8")
    (folder / "odd.safetensors").write_bytes(b"{}")

    def stop(*_words: object, **_settings: object) -> None:
        raise FlashVaedError("as far as this goes")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        put_in_place_of_stages(patch, stop)
        result = CliRunner().invoke(app, argv)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in (0, 1, 2), result.exit_code


def _ignore(_message: str) -> None:
    pass


def _open_checkpoint(path: Path, family: str | None) -> None:
    with suppress(FlashVaedError):
        checkpoint = load_checkpoint(path, builtins={}, family=family)
        for coder in (checkpoint.decoder, checkpoint.encoder):
            assert coder is None or all(torch.isfinite(one).all() for one in coder.parameters())


def _open_latents(draw: Draw, path: Path) -> None:
    with suppress(FlashVaedError):
        latents = load_latents(path, latent_width=draw(_WIDTHS))
        assert latents.dim() == 5 and latents.numel() and bool(torch.isfinite(latents).all())


TARGETS: dict[str, Target] = {
    "artifact headers": artifact_headers,
    "safetensors files": safetensors_files,
    "foreign checkpoints": foreign_checkpoints,
    "pytorch files": pytorch_files,
    "latent files": latent_files,
    "recipes": recipes,
    "latent caches": latent_caches,
    "videos": videos,
    "command lines": command_lines,
}

HEAVY_INPUT = (
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.large_base_example,
)
"""What hypothesis finds unhealthy about inputs that are whole files."""
