"""Files of TAEHV, small and with random weights, against their arithmetic written out on frames as a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flashvaed_cli.artifact.checkpoint import Checkpoint, derived_header, load_checkpoint, save_checkpoint
from flashvaed_cli.artifact.foreign.taehv import _UNKNOWN_LATENTS
from flashvaed_cli.artifact.header_checks import check_factors
from flashvaed_cli.decoders.predict.cost import stage_costs
from flashvaed_cli.decoders.predict.memory import passages
from flashvaed_cli.decoders.run.runtime import DecodeRuntime, DecodeSettings
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.decoders.spec.light import light_shape
from flashvaed_cli.decoders.variants.exact import exact_decoder
from flashvaed_cli.decoders.variants.still import still_decoder
from flashvaed_cli.errors import ArtifactError, SpecError
from flashvaed_cli.export.onnx_graph import OnnxOptions, export_onnx
from flashvaed_cli.families.registry import FAMILIES
from flashvaed_cli.progress import SilentProgress
from flashvaed_cli.surgery.layer_fit import FitSettings
from flashvaed_cli.surgery.reconstruct import reconstruct_coder
from flashvaed_cli.surgery.transfer import transfer_weights
from tests.ltx_toy import ltx_decoder

WIDTHS = (8, 6, 4, 4)
BOUND = 3e-6  # float32, of the range


def tensors_of(latent_width: int, patch: int, *, spare_growth: bool = False) -> dict[str, Tensor]:
    """Three stages, their chains, growths and convolutions; `spare_growth`: the first stage's growth is for two, whose
    first half a decoder that grows four times leaves aside."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}

    def add(name: str, *shape: int, bias: bool = True) -> None:
        weight = torch.randn(shape, generator=generator)
        found[f"{name}.weight"] = weight * (1.6 / weight[0].numel()) ** 0.5
        if bias:
            found[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator)

    add("decoder.1", WIDTHS[0], latent_width, 3, 3)
    for stage, width in enumerate(WIDTHS[:3]):
        start = 3 + 6 * stage
        for block in range(3):
            for slot, reads in ((0, 2 * width), (2, width), (4, width)):
                add(f"decoder.{start + block}.conv.{slot}", width, reads, 3, 3)
        frames = 2 if stage or spare_growth else 1
        add(f"decoder.{start + 4}.conv", frames * width, width, 1, 1, bias=False)
        add(f"decoder.{start + 5}", WIDTHS[stage + 1], width, 3, 3, bias=False)
    add("decoder.22", 3 * patch**2, WIDTHS[3], 3, 3)
    add("encoder.0", 4, 3, 3, 3)
    return found


def expected_frames(tensors: dict[str, Tensor], latents: Tensor, patch: int, temporal_factor: int = 4) -> Tensor:
    """Frames `[F, 3, H, W]` in [0, 1], not clamped, of normalized latents `[T, C, Hz, Wz]`."""

    def conv(name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), padding="same")

    x = F.relu(conv("decoder.1", 3 * torch.tanh(latents / 3)))
    for stage, width in enumerate(WIDTHS[:3]):
        start = 3 + 6 * stage
        for block in range(3):
            before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
            h = torch.cat([x, before], dim=1)
            for slot in (0, 2, 4):
                h = conv(f"decoder.{start + block}.conv.{slot}", F.relu(h) if slot else h)
            x = F.relu(h + x)
        x = F.interpolate(x, scale_factor=2)
        frames = 2 if stage or temporal_factor == 8 else 1
        grown = F.conv2d(x, tensors[f"decoder.{start + 4}.conv.weight"][-frames * width :])
        x = conv(f"decoder.{start + 5}", grown.reshape(-1, width, *x.shape[2:]))
    return F.pixel_shuffle(conv("decoder.22", F.relu(x)), patch)[temporal_factor - 1 :]


def written(path: Path, latent_width: int = 16, patch: int = 1, *, spare_growth: bool = False) -> dict[str, Tensor]:
    tensors = tensors_of(latent_width, patch, spare_growth=spare_growth)
    torch.save(tensors, path)
    return tensors


def load(path: Path, family: str | None = "wan2.1") -> Checkpoint:
    return load_checkpoint(path, builtins={}, family=family)


def written_ltx2(path: Path) -> Path:
    """A narrow LTX-2, with latent statistics of its own."""
    decoder = ltx_decoder(FAMILIES["ltx-2"].decoder_spec(4, 128))
    statistics = tuple(0.01 * i for i in range(128)), tuple(1 + 0.01 * i for i in range(128))
    made = Checkpoint("ltx2", "0" * 64, "flashvaed", "ltx-2", decoder, None, *statistics)
    save_checkpoint(path, derived_header(made), decoder=decoder)
    return path


@pytest.fixture
def taehv(tmp_path: Path) -> Checkpoint:
    written(tmp_path / "taew2_1.pth")
    return load(tmp_path / "taew2_1.pth")


@pytest.mark.parametrize(
    ("family", "latent_width", "patch", "spare_growth"),
    [("wan2.1", 16, 1, False), ("wan2.1", 16, 1, True), ("qwen-image", 16, 1, False), ("wan2.2", 48, 2, False)],
)
def test_it_gives_the_frames_of_its_arithmetic(
    tmp_path: Path, family: str, latent_width: int, patch: int, spare_growth: bool
) -> None:
    tensors = written(tmp_path / "tae.pth", latent_width, patch, spare_growth=spare_growth)
    checkpoint = load(tmp_path / "tae.pth", family)
    assert (checkpoint.family, checkpoint.layout, checkpoint.encoder) == (family, "taehv", None)
    assert "encoder is ignored" in checkpoint.notes[0]
    decoder = checkpoint.require_decoder()
    check_factors(decoder.spec)
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in checkpoint.require_statistics())
    latents = torch.randn(latent_width, 4, 3, 5)
    found = decoder((latents * std + mean)[None])[0].transpose(0, 1)  # [F, 3, H, W]
    expected = 2 * expected_frames(tensors, latents.transpose(0, 1), patch) - 1
    assert found.shape == expected.shape and found.shape[0] == decoder.spec.num_frames(4) == 13
    assert (found - expected).abs().max() < BOUND * (expected.max() - expected.min())


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_tiles_and_twins_give_the_whole_clips_frames(taehv: Checkpoint, chunk: int) -> None:
    decoder, latents = taehv.require_decoder(), torch.randn(1, 16, 5, 6, 7)
    decoder.get_parameter("stages.head.0.conv.weight").mul_(0.02)  # few pixels are clamped
    whole = decode(decoder, latents)
    assert whole.shape == (1, 3, 17, 48, 56) and whole.std() > 0.01
    torch.testing.assert_close(decode(decoder, latents, chunk=chunk), whole, rtol=0, atol=BOUND)
    tiled = DecodeRuntime(exact_decoder(decoder), DecodeSettings(chunk=chunk, tile=3)).decode(latents)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=BOUND)


def test_lead_frames_count_in_cost_and_memory(taehv: Checkpoint) -> None:
    spec = taehv.require_decoder().spec
    assert light_shape(spec) == "tae"
    first, later = (passages(spec, (3, 2, 2), streams=streams) for streams in (False, True))
    assert [(one.frames, one.frames_after) for one in first[-2:]] == [(6, 12), (12, 9)]
    assert [(one.frames, one.frames_after) for one in later[-2:]] == [(6, 12), (12, 12)]
    flop = {layer.address: layer.flop for stage in stage_costs(spec, (3, 2, 2)) for layer in stage.layers}
    assert flop["head.0.conv"] == 2 * 9 * 16 * 16 * WIDTHS[3] * 3 * 9
    assert flop["up1.3.temporal"] == 2 * 3 * 4 * 4 * 2 * WIDTHS[1] ** 2


def test_it_becomes_an_artifact_and_is_refitted(taehv: Checkpoint, tmp_path: Path) -> None:
    decoder, latents = taehv.require_decoder(), [torch.randn(1, 16, 3, 4, 4) for _ in range(2)]
    save_checkpoint(tmp_path / "own.safetensors", derived_header(taehv), decoder=decoder)
    again = load(tmp_path / "own.safetensors").require_decoder()
    assert again.spec == decoder.spec and torch.equal(again(latents[0]), decoder(latents[0]))
    student = transfer_weights(decoder, decoder.spec, {})
    settings, silent = FitSettings(), SilentProgress()
    reconstruct_coder(decoder, student, {}, latents, first_block="conv_in.0", settings=settings, progress=silent)
    expected = decoder(latents[0])
    assert (student(latents[0]) - expected).square().mean() < 1e-6 * expected.var()


def test_refusals_say_why(tmp_path: Path) -> None:
    path = tmp_path / "tae.pth"
    written(path)
    with pytest.raises(ArtifactError, match=r"family with --family; by its shapes it fits wan2\.1, qwen-image"):
        load(path, None)
    with pytest.raises(ArtifactError, match=r"which those of wan2\.2 are not; it fits wan2\.1, qwen-image"):
        load(path, "wan2.2")
    written(path, 128, 4, spare_growth=True)
    with pytest.raises(ArtifactError, match=r"those of ltx-2 are in that model's own files only\. Give one with --ori"):
        load(path, "ltx-2")
    tensors = tensors_of(16, 1)
    del tensors["decoder.10.conv.0.weight"]
    torch.save(tensors, path)
    with pytest.raises(ArtifactError, match=r"a TAEHV without decoder\.10\.conv\.0\.weight"):
        load(path)
    torch.save({**tensors_of(16, 1), "decoder.9.conv.2.weight": torch.zeros(5, 6, 3, 3)}, path)
    with pytest.raises(
        ArtifactError, match=r"decoder\.9\.conv\.2\.weight has the shape \[5, 6, 3, 3\], not \[6, 6, 3, 3\]"
    ):
        load(path)
    torch.save({"decoder.0.weight": torch.zeros(2, 2, 1, 1), "decoder.1.conv.0.weight": torch.zeros(4, 1, 7, 7)}, path)
    with pytest.raises(ArtifactError, match=r"larger \(super\) kind.* depthwise kernels of 7 x 7 on two frames"):
        load(path)


def test_a_published_name_tells_the_latents(tmp_path: Path) -> None:
    """HunyuanVideo's file and Wan 2.1's have the same shapes."""
    written(tmp_path / "taew2_1.pth")
    assert load(tmp_path / "taew2_1.pth", None).family == "wan2.1"
    assert load(tmp_path / "taew2_1.pth", "qwen-image").family == "qwen-image"  # one network with Wan 2.1's
    (tmp_path / "taew2_1.pth").rename(tmp_path / "taehv.pth")
    assert load(tmp_path / "taehv.pth", None).family == "hunyuanvideo"
    with pytest.raises(ArtifactError, match=r"as the one for hunyuanvideo, which those of wan2\.1 are not"):
        load(tmp_path / "taehv.pth", "wan2.1")
    (tmp_path / "taehv.pth").rename(tmp_path / "taecvx.pth")
    for family in (None, "wan2.1"):
        with pytest.raises(ArtifactError, match=r"TAEHV's file for CogVideoX is called.* Rename the file if"):
            load(tmp_path / "taecvx.pth", family)
    written(tmp_path / "taeltx2_3.pth", 128, 4, spare_growth=True)
    with pytest.raises(ArtifactError, match=r"as the one for ltx-2\.3, which those of ltx-2 are not"):
        load(tmp_path / "taeltx2_3.pth", "ltx-2")


def test_no_published_name_is_known_and_unknown() -> None:
    known = [name for family in FAMILIES.values() for name in family.elsewhere.taehv]
    assert known and not set(known) & set(_UNKNOWN_LATENTS)


def test_with_the_statistics_of_an_original_it_gives_eight_frames_for_one(tmp_path: Path) -> None:
    tensors = written(tmp_path / "taeltx_2.pth", 128, 4, spare_growth=True)
    original = written_ltx2(tmp_path / "ltx2.safetensors")
    checkpoint = load_checkpoint(tmp_path / "taeltx_2.pth", builtins={}, original=str(original))
    assert checkpoint.family == "ltx-2"
    mean, std = checkpoint.require_statistics()
    assert (mean, std) == load(original, "ltx-2").require_statistics() and len(set(std)) > 1
    decoder, latents = checkpoint.require_decoder().double(), torch.randn(128, 3, 1, 2).double()
    tensors = {key: tensor.double() for key, tensor in tensors.items()}  # rounding differs between processors
    raw = latents * torch.tensor(std).double().view(-1, 1, 1, 1) + torch.tensor(mean).double().view(-1, 1, 1, 1)
    found = decoder(raw[None])[0].transpose(0, 1)
    expected = 2 * expected_frames(tensors, latents.transpose(0, 1), 4, 8) - 1
    assert found.shape == expected.shape and found.shape[0] == decoder.spec.num_frames(3) == 17
    assert (found - expected).abs().max() < BOUND * (expected.max() - expected.min())
    clamped = expected.clamp(-1, 1).transpose(0, 1)[None]
    torch.testing.assert_close(decode(decoder, raw[None], chunk=1), clamped, rtol=0, atol=1e-5)


def test_its_first_frame_alone_is_no_image_decoder(taehv: Checkpoint) -> None:
    with pytest.raises(SpecError, match="drops lead frames"):
        still_decoder(taehv.require_decoder())


def test_the_graph_of_a_clip_drops_the_lead_frames_too(taehv: Checkpoint, tmp_path: Path) -> None:
    """The export compares it with PyTorch and raises if they differ."""
    decoder = taehv.require_decoder()
    decoder.get_parameter("stages.head.0.conv.weight").mul_(0.02)
    (result,) = export_onnx(
        decoder, tmp_path / "tae.onnx", options=OnnxOptions(), kinds=("clip",), progress=SilentProgress()
    )
    assert result.max_abs_difference <= result.tolerance
