"""Files of strangers: values out of range, other sets of weights, places that a file names."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_specs import DECODER_SPEC, header, small_decoder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from flashvaed_cli.artifact.checkpoint import load_checkpoint, save_checkpoint
from flashvaed_cli.artifact.foreign.layouts import to_foreign
from flashvaed_cli.artifact.header import Lineage, dump_header, parse_header
from flashvaed_cli.artifact.header_checks import check_factors
from flashvaed_cli.artifact.original import load_original
from flashvaed_cli.artifact.store import sha256_of
from flashvaed_cli.decoders.variants.still import still_spec
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.families.family import Family
from flashvaed_cli.families.registry import FAMILIES
from flashvaed_cli.families.wan21.names import WAN_DIFFUSERS
from flashvaed_cli.limits import MAX_MESSAGE_CHARS

Header = dict[str, Any]


@pytest.fixture(scope="module")
def plain() -> str:
    return dump_header(header(decoder=DECODER_SPEC, kept_channels={"up2.0": range(8)}, measured={"a": [1, {"b": 2}]}))


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return to_foreign(small_decoder().state_dict(), DECODER_SPEC, WAN_DIFFUSERS)


def _set(*path: str | int, to: object) -> Callable[[Header], None]:
    def change(raw: Header) -> None:
        place: Any = raw
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = to

    return change


_CONV = ("decoder", "stages", 1, "blocks", 0, "conv")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_set("latent_std", 3, to=0.0), r"latent_std holds 0\.0"),
        (_set("latent_std", 3, to=-1.0), r"latent_std holds -1\.0"),
        (_set("latent_std", 3, to=math.nan), r"latent_std\.3: .*finite"),
        (_set("latent_std", 3, to=1e300), r"latent_std holds 1e\+300"),
        (_set("latent_std", 3, to=1e-300), r"1 / latent_std holds 1e\+300"),
        (_set("latent_mean", 3, to=-1e300), r"latent_mean holds -1e\+300"),
        (_set("latent_mean", 3, to=math.inf), r"latent_mean\.3: .*finite"),
        (_set("latent_std", to=[1.0] * 15), "16 figures and latent_std 15"),
        (_set("latent_mean", to=[]), "0 figures and latent_std 16"),
        (_set("family", to="wan9"), "family 'wan9' is unknown"),
        (_set("decoder", "family", to="qwen-image"), "decoder.family is 'qwen-image'"),
        (_set("decoder", "temporal_factor", to=8), "temporal_factor 8"),
        (_set("decoder", "spatial_factor", to=16), "spatial_factor 16"),
        (_set("decoder", "spatial_factor", to=-8), "spatial_factor.*-8"),
        (_set("decoder", "patch", to=2), "patch 2"),
        (_set("kept_channels", "up2.0", 0, to=-1), "up2.0 holds indices"),
        (_set("kept_channels", "up2.0", 0, to=1), "up2.0 holds indices that repeat"),
        (_set("kept_channels", "up2.0", 0, to=10**9), "out of range"),
        (_set("kept_channels", "up2.0", to=[0]), "1 for up2.0, which has 8"),
        (_set("kept_channels", "up9.0", to=[0]), "'up9.0' is no tensor"),
        (_set("decoder", "stages", -1, "blocks", 0, "norm", "eps", to=-1e-6), "eps.*-1e-06"),
        (_set("decoder", "stages", -1, "blocks", 0, "norm", "eps", to=math.nan), "eps"),
        (_set(*_CONV, "kernel", to=[3, 3, -3]), "kernel.*-3"),
        (_set(*_CONV, "kernel", to=[3, 3, 10**9]), "kernel.*1000000000"),
        (_set(*_CONV, "kernel", to=[3, 2, 2]), "odd number of taps"),
        (_set(*_CONV, "out_width", to=10**12), "out_width.*1000000000000"),
        (_set("decoder", "stages", 1, "name", to="a.b"), "name.*'a.b'"),
        (_set("decoder", "stages", 1, "name", to="up3"), "two stages are called up3"),
        (_set("decoder", "stages", 1, "blocks", to=[]), "blocks"),
        (_set("decoder", "stages", to=[]), "stages"),
        (_set("decoder", "decode_timestep", to=math.nan), "decode_timestep"),
        (_set("measured", to=[]), "measured"),
    ],
)
def test_values_out_of_range_are_refused_by_name(plain: str, change: Callable[[Header], None], match: str) -> None:
    raw = json.loads(plain)
    change(raw)
    with pytest.raises(ArtifactError, match=match) as caught:
        parse_header(json.dumps(raw), "x")
    assert len(str(caught.value)) <= MAX_MESSAGE_CHARS


def test_a_hundred_thousand_blocks(plain: str) -> None:
    raw = json.loads(plain)
    stage = raw["decoder"]["stages"][1]
    for many in ([stage] * 3_000, [{**stage, "blocks": stage["blocks"] * 10_000}]):
        raw["decoder"]["stages"] = many
        with pytest.raises(ArtifactError, match="at most"):
            parse_header(json.dumps(raw), "x")


_ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5), st.just([]), st.just({}),
    st.just([[[]]]), st.just({"kind": "conv"}), st.sampled_from([10**400, "NaN", -0.0, "\x00", "a.b"]),
)  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_headers_are_read_or_refused(plain: str, data: st.DataObject) -> None:
    raw = json.loads(plain)
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = raw
        while True:
            key = data.draw(
                st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1)
            )
            inner = place[key]
            if not (isinstance(inner, dict | list) and inner and data.draw(st.booleans())):
                break
            place = inner
        place[key] = data.draw(_ODD)
    with suppress(ArtifactError):  # anything else is a traceback
        assert dump_header(parse_header(json.dumps(raw), "x"))


def _folder(path: Path, tensors: dict[str, Tensor], config: object) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "diffusion_pytorch_model.safetensors")
    return path


_VALUES = ([], "x", -1, True, [None], {"a": 1}, 10**400, math.nan)
_KEYS = ("_class_name", "base_dim", "z_dim", "dim_mult", "latents_mean", "latents_std", "scaling_factor")


@pytest.mark.parametrize("key", _KEYS)
def test_configurations_with_odd_values_load_or_are_named(tmp_path: Path, weights: dict[str, Tensor], key: str) -> None:
    sound = {"_class_name": "AutoencoderKLWan", "base_dim": 4, "z_dim": 16, "latents_mean": [0.0] * 16}
    for value in _VALUES:
        config = {**sound, "latents_std": [1.0] * 16, key: value}
        with suppress(ArtifactError):  # anything else is a traceback
            checkpoint = load_checkpoint(_folder(tmp_path, weights, config), builtins={})
            assert all(map(math.isfinite, checkpoint.latent_mean)) and min(checkpoint.latent_std) > 0


def test_statistics_of_a_configuration_are_checked_alike(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    folder = _folder(tmp_path, weights, {"latents_mean": [0.0] * 16, "latents_std": [1.0] * 15 + [1e300]})
    with pytest.raises(ArtifactError, match=r"latent_std holds 1e\+300.*config\.json"):
        load_checkpoint(folder, builtins={})


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e20])
def test_weights_that_nothing_can_run_with_are_named(tmp_path: Path, value: float) -> None:
    decoder = small_decoder()
    with torch.no_grad():
        decoder.at("up2.0.conv1").weight[0, 0, 0, 0, 0] = value  # type: ignore[union-attr, index]
    wanted = r"up2\.0\.conv1\.weight of the decoder holds .*; the file is damaged"
    save_file(to_foreign(decoder.state_dict(), DECODER_SPEC, WAN_DIFFUSERS), tmp_path / "foreign.safetensors")
    with pytest.raises(ArtifactError, match=wanted):
        load_checkpoint(tmp_path / "foreign.safetensors", builtins={})


@pytest.mark.parametrize("weight_map", [None, [], 3, {"a": None}, {"a": ["x"]}, {}])
def test_shard_indexes_of_another_shape(tmp_path: Path, weight_map: object) -> None:
    folder = _folder(tmp_path, {}, {})
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ArtifactError, match=r"weight_map|names shards"):
        load_checkpoint(folder, builtins={})


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", "a/b.safetensors", "..\\x", "C:\\x"])
def test_shards_outside_the_folder(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    folder = _folder(tmp_path / "vae", {}, {})
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ArtifactError, match="outside its folder"):
        load_checkpoint(folder, builtins={})


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("old", [False, True])
def test_shards_of_a_variant(tmp_path: Path, weights: dict[str, Tensor], suffix: str, old: bool) -> None:
    folder = _folder(tmp_path, {}, {"_class_name": "AutoencoderKLWan"})
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for i in (0, 1):
        shard = f"diffusion_pytorch_model.fp16-0000{i + 1}-of-00002.{suffix}"
        held = {name: weights[name].half() for name in names[i::2]}
        save_file(held, folder / shard) if suffix == "safetensors" else torch.save(held, folder / shard)
        weight_map |= dict.fromkeys(held, shard)
    stem = "diffusion_pytorch_model"
    index = f"{stem}.fp16.{suffix}.index.json" if old else f"{stem}.{suffix}.index.fp16.json"
    (folder / index).write_text(json.dumps({"weight_map": weight_map}))
    found = load_checkpoint(folder, builtins={}).require_decoder().at("conv_in.0.conv").weight
    assert isinstance(found, Tensor)
    assert torch.equal(found, weights["decoder.conv_in.weight"].half().float())


def test_full_precision_comes_first_and_a_variant_can_be_asked_for(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    folder = _folder(tmp_path, weights, {"_class_name": "AutoencoderKLWan"})
    half = {name: value.half() for name, value in weights.items()}
    save_file(half, folder / "diffusion_pytorch_model.fp16.safetensors")
    name = "decoder.conv_in.weight"
    for wanted, expected in ((None, weights[name]), ("fp16", half[name].float())):
        checkpoint = load_checkpoint(folder, builtins={}, weights=wanted)
        found = checkpoint.require_decoder().at("conv_in.0.conv").weight
        assert isinstance(found, Tensor) and torch.equal(found, expected)


def _doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: 2 * value for name, value in tensors.items()}


def _first_weight(path: Path, wanted: str | None = None) -> tuple[Tensor, tuple[str, ...]]:
    checkpoint = load_checkpoint(path, builtins={}, weights=wanted)
    found = checkpoint.require_decoder().at("conv_in.0.conv").weight
    assert isinstance(found, Tensor)
    return found, checkpoint.notes


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("model", lambda own, ema: {"model": own, "ema": ema}),
        ("state_dict", lambda own, ema: {"ema_state_dict": ema, "state_dict": own, "epoch": 3}),
        ("params", lambda own, ema: {"params_ema": ema, "params": own}),
        ("generator", lambda own, ema: {"generator": own, "generator_ema": ema, "discriminator": {"a": torch.ones(1)}}),
        ("model", lambda own, ema: {"model": own, "ema": {"decay": 0.99, "shadow": ema}}),
        (
            "state_dict",
            lambda own, ema: {"state_dict": {"vae." + k: v for k, v in own.items()}, "ema": {"module": ema}},
        ),
        (
            "vae",
            lambda own, ema: {
                "state_dict": {
                    **{"vae_ema." + k: v for k, v in ema.items()},
                    **{"vae." + k: v for k, v in own.items()},
                    "loss.discriminator.0.weight": torch.ones(3),
                }
            },
        ),
    ],
)
def test_weights_and_their_average(tmp_path: Path, weights: dict[str, Tensor], name: str, wrap: Callable) -> None:
    path = tmp_path / "x.pth"
    torch.save(wrap(weights, _doubled(weights)), path)
    first = weights["decoder.conv_in.weight"]
    found, notes = _first_weight(path)
    assert torch.equal(found, first)
    assert any(f"{name}'" in note and "--weights ema" in note for note in notes)
    found, _ = _first_weight(path, "ema")
    assert torch.equal(found, 2 * first)
    found, _ = _first_weight(path, name)
    assert torch.equal(found, first)
    with pytest.raises(ArtifactError, match="no weights called best: it holds"):
        _first_weight(path, "best")


@pytest.mark.parametrize("key", ["params_ema", "generator", "ema", "g_ema"])
def test_one_set_under_any_name(tmp_path: Path, weights: dict[str, Tensor], key: str) -> None:
    torch.save({key: weights, "step": 3}, tmp_path / "x.pth")
    found, notes = _first_weight(tmp_path / "x.pth")
    assert torch.equal(found, weights["decoder.conv_in.weight"])
    assert not any("also holds" in note for note in notes)


def test_a_lightning_file_with_a_discriminator(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    state = {"vae." + name: value for name, value in weights.items()} | {"loss.logvar": torch.ones(())}
    torch.save(
        {"state_dict": state, "pytorch-lightning_version": "2.0", "hyper_parameters": {"a": 1}}, tmp_path / "x.ckpt"
    )
    assert torch.equal(_first_weight(tmp_path / "x.ckpt")[0], weights["decoder.conv_in.weight"])


def test_an_artifact_remembers_which_weights(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    torch.save({"model": weights, "ema": _doubled(weights)}, tmp_path / "both.pth")
    averaged = load_checkpoint(tmp_path / "both.pth", builtins={}, weights="ema")
    lineage = averaged.lineage("original")
    save_checkpoint(tmp_path / "s.safetensors", header(original=lineage), decoder=averaged.require_decoder())
    student = load_checkpoint(tmp_path / "s.safetensors", builtins={})
    original = load_original(student, None, {}, needs_encoder=False).require_decoder()
    for name, value in averaged.require_decoder().state_dict().items():
        assert torch.equal(original.state_dict()[name], value)
    with pytest.raises(ArtifactError, match="Leave --weights out"):
        load_checkpoint(tmp_path / "s.safetensors", builtins={}, weights="ema")


def _student_of(location: str, sha256: str, path: Path) -> Path:
    original = Lineage(role="original", location=location, sha256=sha256)
    save_checkpoint(path, header(original=original), decoder=small_decoder(), force=True)
    return path


def test_a_recorded_path_is_hashed_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "trap.pth"
    trap.write_bytes(b"PK\x03\x04 anything")
    student = load_checkpoint(_student_of(str(trap), "0" * 64, tmp_path / "s.safetensors"), builtins={})

    def parse(*_: object, **__: object) -> None:
        pytest.fail("parsed a file that the user did not name")

    monkeypatch.setattr("flashvaed_cli.artifact.foreign.weights.load_pytorch", parse)
    with pytest.raises(ArtifactError, match=rf"expected SHA-256 0+ .*found {sha256_of(trap)}[\s\S]*--original"):
        load_original(student, None, {})


@pytest.mark.parametrize("place", ["pipe", "/dev/zero", "~nouser/x", "a\x00b", "hf://some/repo/x.pth", "x" * 300])
def test_recorded_places_that_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    import huggingface_hub

    def ask(*_: object, **__: object) -> None:
        pytest.fail("asked the network")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", ask)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    student = load_checkpoint(_student_of(place, "0" * 64, tmp_path / "s.safetensors"), builtins={})
    with pytest.raises(ArtifactError, match="--original") as caught:
        load_original(student, None, {})
    assert ("--allow-download" in str(caught.value)) == place.startswith("hf://")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_every_familys_originals_fit_their_own_factors(family: Family) -> None:
    decoder = family.decoder_spec(8, family.latent_width)
    specs = [decoder, family.encoder_spec(8, family.latent_width)]
    if family.name != "leanvae":  # whose layers see time
        specs.append(still_spec(decoder))
    for spec in specs:
        check_factors(spec)
