"""The bypass of a stage, and the walk through the blocks, which includes it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from flashvaed_cli.decoders.modules.bypass import Bypass
from flashvaed_cli.decoders.modules.patches import patchify, unpatchify
from flashvaed_cli.decoders.spec.coders import BypassSpec, StageSpec
from flashvaed_cli.families.wan22.spec import wan22_encoder_spec
from tests.toy import WAN22_SPECS, original_spec, toy_decoder, toy_latents, wan22_spec


def random_clip(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def bypass_of(in_width: int, out_width: int, ft: int, fs: int, *, layer: bool) -> Bypass:
    spec = BypassSpec(kind="duplicate", in_width=in_width, out_width=out_width, temporal_factor=ft, spatial_factor=fs)  # type: ignore[arg-type]
    return Bypass(spec.narrowed(in_width, out_width) if layer else spec, "up0.3").double().requires_grad_(False)


def duplicated(x: Tensor, weight: Tensor, bias: Tensor, ft: int, fs: int, *, is_first: bool) -> Tensor:
    """Position by position."""
    b, _, t, h, w = x.shape
    cell = ft * fs * fs
    y = x.new_zeros(b, len(weight) // cell, ft * t, fs * h, fs * w)
    for frame in range(y.shape[2]):
        for row in range(y.shape[3]):
            for column in range(y.shape[4]):
                s = (frame % ft * fs + row % fs) * fs + column % fs
                y[:, :, frame, row, column] = (
                    x[:, :, frame // ft, row // fs, column // fs] @ weight[s::cell].T + (bias[s::cell])
                )
    return y[:, :, ft - 1 :] if is_first else y


SHAPES = [(4, 4, 2, 2), (4, 2, 1, 2), (2, 3, 2, 2), (8, 2, 2, 2), (3, 3, 1, 1)]


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("layer", [True, False])
@pytest.mark.parametrize(("in_width", "out_width", "ft", "fs"), SHAPES)
def test_duplicates_go_where_they_belong(in_width, out_width, ft, fs, layer, is_first) -> None:
    bypass = bypass_of(in_width, out_width, ft, fs, layer=layer)
    x = random_clip(2, in_width, 3, 2, 3)
    expected = duplicated(x, *bypass.matrix() if layer else _copies(bypass.spec), ft, fs, is_first=is_first)
    carried = bypass.carried(x, is_first=is_first)
    torch.testing.assert_close(carried, expected, rtol=0, atol=1e-12)
    before = random_clip(*carried.shape)
    with torch.enable_grad():
        added = bypass(before, x, is_first=is_first)
    with torch.no_grad():  # in place, cell position by cell position
        in_place = bypass(before.clone(), x, is_first=is_first)
    torch.testing.assert_close(added, before + expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(in_place, added, rtol=0, atol=1e-12)


def _copies(spec: BypassSpec) -> tuple[Tensor, Tensor]:
    num_wide = spec.out_width * spec.cell_size
    weight = torch.zeros(num_wide, spec.in_width, dtype=torch.float64)
    for channel in range(num_wide):
        weight[channel, channel * spec.in_width // num_wide] = 1
    return weight, weight.new_zeros(num_wide)


def test_an_average_takes_missing_frames_for_zero() -> None:
    spec = BypassSpec(kind="average", in_width=2, out_width=4, temporal_factor=2, spatial_factor=2)
    x = random_clip(1, 2, 3, 2, 2)
    y = Bypass(spec, "down1.2").carried(x, is_first=True)
    assert y.shape == (1, 4, 2, 1, 1)
    first = [x[0, 0, 0].sum() * 0, x[0, 0, 0].sum() / 4]  # channels 0 and 1: frame before the first, the first
    torch.testing.assert_close(y[0, :2, 0, 0, 0], torch.stack(first))
    last = [x[0, 1, 1].mean(), x[0, 1, 2].mean()]  # channels 2 and 3 of the second position: frames 1 and 2
    torch.testing.assert_close(y[0, 2:, 1, 0, 0], torch.stack(last))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out_width": 3, "in_width": 8, "temporal_factor": 1}, "cannot join 8 channels to 3"),
        ({"kind": "average", "in_width": 3, "out_width": 8, "spatial_factor": 1}, "cannot join 3 channels to 8"),
        ({"kind": "average", "conv": bypass_of(4, 4, 2, 2, layer=True).spec.conv}, "pointwise, 4 to 32 channels"),
        ({"conv": bypass_of(4, 3, 2, 2, layer=True).spec.conv}, "pointwise, 4 to 32 channels"),
    ],
)
def test_widths_that_do_not_fit_are_refused(changes: dict, message: str) -> None:
    fields = {"kind": "duplicate", "in_width": 4, "out_width": 4, "temporal_factor": 2, "spatial_factor": 2}
    with pytest.raises(ValidationError, match=message):
        BypassSpec(**{**fields, **changes})
    stage = wan22_spec().stage("up0")
    assert stage.bypass is not None
    with pytest.raises(ValidationError, match="the bypass of up0 joins 8 channels to 16, its blocks 16 to 16"):
        StageSpec(name="up0", blocks=stage.blocks, bypass=stage.bypass.model_copy(update={"in_width": 8}))


def test_the_layer_of_a_bypass_counts_among_the_layers() -> None:
    assert not [address for address, _ in wan22_spec().layers() if "bypass" in address]
    pruned = WAN22_SPECS["pruned"]
    assert [address for address, _ in pruned.layers() if "bypass" in address] == ["up1.3.bypass", "up2.3.bypass"]
    decoder = toy_decoder(pruned)
    assert decoder.at("up2.3.bypass") is decoder.get_submodule("bypasses.up2.conv")
    assert wan22_encoder_spec(4, 4).bypassed().keys() == {"down0.2", "down1.2", "down2.2", "down3.1"}


@pytest.mark.parametrize("spec", [original_spec(), *WAN22_SPECS.values()], ids=["wan2.1", *WAN22_SPECS])
def test_a_walk_in_parts_is_the_whole_walk(spec) -> None:
    decoder, latents = toy_decoder(spec).double(), toy_latents(2, 1, 2).double()
    with torch.no_grad():
        whole = decoder(latents)
        outputs = dict(decoder.walk(latents))
        assert list(outputs) == [address for address, _ in spec.blocks()]
        torch.testing.assert_close(decoder.leave(outputs["head.0"]), whole, rtol=0, atol=0)
        before = decoder.run(latents, stop="up2.0")
        torch.testing.assert_close(before, outputs["up1.3"], rtol=0, atol=1e-12)
        torch.testing.assert_close(decoder.run(before, start="up2.0"), whole, rtol=0, atol=1e-12)


def test_a_walk_leaves_the_input_of_a_stage_unchanged() -> None:
    decoder, latents = toy_decoder(wan22_spec()), toy_latents(2, 1, 2)
    seen: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for _, x in decoder.walk(latents):
            seen.append((x, x.clone()))
    changed = [before for before, copy in seen[:-1] if not torch.equal(before, copy)]
    assert not changed


@given(patch=st.sampled_from([1, 2, 4]), size=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)))
@settings(max_examples=10)
def test_patches_go_there_and_back(patch: int, size: tuple[int, int, int]) -> None:
    pixels = random_clip(1, 3, size[0], size[1] * patch, size[2] * patch)
    patches = patchify(pixels, patch)
    assert patches.shape == (1, 3 * patch**2, *size)
    assert torch.equal(unpatchify(patches, patch), pixels)
    row, column = patch - 1, 0
    channel = (2 * patch + column) * patch + row
    assert torch.equal(patches[:, channel], pixels[:, 2, :, row::patch, column::patch])
