from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from flashvaed_cli.calibrate.statistics import collect_statistics
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.spec.groups import tensor_widths
from flashvaed_cli.errors import CalibrationError
from flashvaed_cli.progress import SilentProgress
from tests.toy import DECODER_SPECS, toy_decoder, toy_latents

CLIPS = [toy_latents(seed=1), toy_latents(2, 3, 2, seed=2), toy_latents(1, 1, 1, seed=3)]


def captured_rows(decoder: Decoder, clips: list[Tensor]) -> dict[str, Tensor]:
    """`[N, C]` per tensor, float64: everything at once, as the accumulation must not do it."""
    rows: dict[str, list[Tensor]] = {tensor: [] for tensor in tensor_widths(decoder.spec)}

    def hook_of(tensor: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, output: rows[tensor].append(output.double().movedim(1, -1))

    handles = [decoder.at(tensor).register_forward_hook(hook_of(tensor)) for tensor in rows]
    for latents in clips:
        decoder(latents)
    for handle in handles:
        handle.remove()
    return {tensor: torch.cat([part.flatten(0, -2) for part in parts]) for tensor, parts in rows.items()}


@pytest.mark.parametrize("name", ["original", "flash"])
def test_statistics_are_those_of_the_activations(name: str) -> None:
    decoder = toy_decoder(DECODER_SPECS[name])
    statistics = collect_statistics(decoder, CLIPS, num_clips=3, progress=SilentProgress())
    expected = captured_rows(decoder, CLIPS)
    assert statistics.keys() == expected.keys()
    for tensor, rows in expected.items():
        found = statistics[tensor]
        assert found.count == len(rows)
        # Products are float32, sums float64.
        torch.testing.assert_close(found.mean, rows.mean(dim=0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.covariance, torch.cov(rows.T, correction=0), rtol=1e-5, atol=1e-6)


def test_clips_are_read_once_and_nothing_is_left_behind() -> None:
    decoder = toy_decoder()
    num_read = []

    def clips() -> Iterator[Tensor]:
        for index, latents in enumerate(CLIPS):
            num_read.append(index)
            yield latents

    collect_statistics(decoder, clips(), num_clips=None, progress=SilentProgress())
    assert num_read == [0, 1, 2]
    assert not any(module._forward_hooks for module in decoder.modules())


@pytest.mark.parametrize("tensor", ["conv_in.0", "up0.3", "up2.0.conv1"])
def test_nan_weights_are_named_by_their_tensor(tensor: str) -> None:
    decoder = toy_decoder()
    layer = {"conv_in.0": "conv_in.0.conv", "up0.3": "up0.3.spatial"}.get(tensor, tensor)
    decoder.get_parameter(f"stages.{layer}.weight").view(-1)[0] = float("nan")
    with pytest.raises(CalibrationError, match=f"activations of {tensor}: NaN or infinite"):
        collect_statistics(decoder, CLIPS, num_clips=3, progress=SilentProgress())
    assert not any(module._forward_hooks for module in decoder.modules())


def test_no_clip_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="at least one clip"):
        collect_statistics(toy_decoder(), [], num_clips=0, progress=SilentProgress())
