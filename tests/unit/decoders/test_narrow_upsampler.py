"""Both kernels of a narrow upsampler as one: the same frames and the same state, with fewer products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashvaed_cli.decoders.modules import blocks
from flashvaed_cli.decoders.modules.blocks import Upsample
from flashvaed_cli.decoders.predict.cost import total_gflop
from flashvaed_cli.decoders.run.streaming import decode
from flashvaed_cli.decoders.spec.layers import ConvSpec
from flashvaed_cli.decoders.spec.resamplers import UpsampleSpec
from flashvaed_cli.decoders.variants.exact import exact_decoder, exact_spec
from flashvaed_cli.families.wan21.spec import wan_decoder_spec
from tests.bench.full_size import paper_layout
from tests.toy import toy_decoder

WIDTH, NARROW = 20, 2


def upsampler(*, grows_first: bool = False) -> Upsample:
    temporal = ConvSpec(operator="tapwise3d", in_width=WIDTH, out_width=2 * WIDTH, kernel=(3, 1, 1))
    spatial = ConvSpec(operator="subpixel2d", in_width=WIDTH, out_width=NARROW, kernel=(1, 3, 3))
    block = Upsample(UpsampleSpec(temporal=temporal, spatial=spatial, grows_first=grows_first), "up1.3").double()
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return block.requires_grad_(False)


def clip(num_frames: int, *, is_last: bool) -> Tensor:
    x = torch.randn(2, WIDTH, num_frames, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last_3d) if is_last else x


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The frames of each call that ran as one kernel."""
    seen: list[int] = []
    original = Upsample._folded

    def counted(self: Upsample, x: Tensor, *rest: Any) -> Tensor:
        seen.append(x.shape[2])
        return original(self, x, *rest)

    monkeypatch.setattr(blocks.Upsample, "_folded", counted)
    return seen


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("grows_first", [False, True])
@pytest.mark.parametrize("chunks", [(4,), (1, 3), (2, 1, 1), (1, 1, 2)])
def test_the_same_frames_and_state(chunks: tuple[int, ...], grows_first: bool, is_last: bool, folds: list[int]) -> None:
    block, x = upsampler(grows_first=grows_first), clip(sum(chunks), is_last=is_last)
    states: dict[bool, dict[str, Tensor] | None] = {True: None, False: None}
    for part in x.split(chunks, dim=2):
        found = {}
        for folded in (True, False):
            future: dict[str, Tensor] = {}
            with torch.set_grad_enabled(not folded):  # with gradients the layers run one by one
                found[folded] = block(part, states[folded], future)
            states[folded] = future
        torch.testing.assert_close(found[True], found[False], rtol=0, atol=1e-12)
        torch.testing.assert_close(states[True], states[False], rtol=0, atol=0)
    assert folds == [n for i, n in enumerate(chunks) if grows_first or i > 0 or n > 1]


@torch.no_grad()
def test_a_hook_on_a_layer_still_sees_its_input(folds: list[int]) -> None:
    block, seen = upsampler(), []
    handle = block.spatial.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape))
    watched = block(clip(3, is_last=True))
    handle.remove()
    assert [tuple(shape) for shape in seen] == [(2, WIDTH, 5, 3, 5)] and folds == []
    torch.testing.assert_close(block(clip(3, is_last=True)), watched, rtol=0, atol=1e-12)
    assert folds == [3]


def test_only_where_few_channels_leave() -> None:
    def folded(ratio: float) -> list[str]:
        spec = exact_spec(paper_layout(96, ratio))
        return [a for a, block in spec.blocks() if isinstance(block, UpsampleSpec) and block.is_folded]

    assert folded(0.125) == ["up1.3"]  # 9 x 24 < 384
    assert folded(0.25) == []
    spec = exact_spec(paper_layout(96, 0.125), device_type="cuda")
    assert not any(isinstance(block, UpsampleSpec) and block.is_folded for _, block in spec.blocks())
    assert not any(isinstance(b, UpsampleSpec) and b.is_folded for _, b in exact_spec(wan_decoder_spec(96)).blocks())


def test_the_products_are_counted() -> None:
    """Of 3 frames the first skips `temporal`; 9 taps for each of the frames that are made, on the small ones."""
    block = upsampler()
    assert block.temporal is not None
    spec = UpsampleSpec(temporal=block.temporal.spec, spatial=block.spatial.spec)
    temporal, at = spec.computed_layer("temporal", (3, 4, 4))
    assert (temporal.in_width, temporal.out_width, temporal.kernel, at) == (WIDTH, 18 * NARROW, (3, 1, 1), (2, 4, 4))
    spatial, at = spec.computed_layer("spatial", (3, 4, 4))
    assert (spatial.in_width, spatial.out_width, spatial.kernel, at) == (WIDTH, 9 * NARROW, (1, 1, 1), (1, 4, 4))


@torch.no_grad()
def test_a_whole_decoder(folds: list[int]) -> None:
    spec = paper_layout(32, 0.125)
    decoder, latents = toy_decoder(spec).double(), torch.randn(1, spec.latent_width, 3, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(decode(exact_decoder(decoder), latents), decode(decoder, latents), rtol=0, atol=1e-10)
    assert folds
    assert total_gflop(exact_spec(spec), (3, 4, 4)) < 0.9 * total_gflop(spec, (3, 4, 4))
