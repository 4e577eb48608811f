"""The released LeanVAE's names, and its tensors as those of our blocks and back.

There a stage keeps its depthwise layers apart from its gated ones, and low channels apart from high ones; encoder and
decoder share `phi`, and most linear layers have no bias. Our biases that are not zero get the names that they would
have there. Pixels lie in [-0.5, 0.5] there: the factor goes into the layers next to the pixels.

Reference: the key names of those files (facts only).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from flashvaed_cli.decoders.spec.naf_blocks import PARTS
from flashvaed_cli.families.layout import Layout
from flashvaed_cli.families.leanvae.spec import NAME
from flashvaed_cli.limits import MAX_STAGE_BLOCKS

PIXEL_RANGE = 0.5
"""Largest value of a pixel in the released model; 1 in ours."""

_BOTTLENECK = "latent_bottleneck"
_RUNS = {"analysis": "forward_l", "synthesis": "backward_l"}
_GATED = {"norm.weight": "0.weight", "norm.bias": "0.bias", "expand.weight": "1.weight", "contract.weight": "4.weight"}
_OWN_BIASES = {"expand.bias": "1.bias", "contract.bias": "4.bias"}
"""Biases of ours that no released layer has: zero unless a fit or training has changed them."""
_PHI, _OTHER_PHI = f"{_BOTTLENECK}.phi", f"{_BOTTLENECK}.encoder_phi"
_PHI_BIAS, _START_BIAS, _MEAN_BIAS = f"{_BOTTLENECK}.phi_bias", f"{_BOTTLENECK}.Q_bias", f"{_BOTTLENECK}.mean_bias"
_DEPTHS = {
    "sep_num_layer": re.compile(r"coder\.low_layer\.dconv_layer\.(\d+)\."),
    "fusion_num_layer": re.compile(r"coder\.fusion_layer\.dconv_layer\.(\d+)\."),
    "ista_iter_num": re.compile(rf"{_BOTTLENECK}\.forward_l\.(\d+)\."),
    "ista_layer_num": re.compile(rf"{_BOTTLENECK}\.forward_l\.\d+\.dconv_layer\.(\d+)\."),
}


def depths(names: Iterable[str]) -> dict[str, int]:
    """The depths that a file's names show, under the names of the release's arguments."""
    names = list(names)
    found: dict[str, int] = {}
    for key, pattern in _DEPTHS.items():
        numbers = [int(match[1]) for name in names if (match := pattern.search(name))]
        if numbers:
            found[key] = min(max(numbers) + 1, MAX_STAGE_BLOCKS)
    return found


class _Unit:
    """A naf block: our name for it, and the places of its branches' layers there."""

    def __init__(self, ours: str, runs: tuple[str, ...], index: int) -> None:
        self.ours, self.runs, self.index = ours, runs, index

    def depthwise(self, end: str) -> list[str]:
        """The names there of the parts of our one tensor."""
        return [f"{run}.dconv_layer.{self.index}.ds_conv.{end}" for run in self.runs]

    def gated(self) -> Iterator[tuple[str, str, bool]]:
        """Names here and there, and whether a released file has the tensor."""
        for branch, run in enumerate(self.runs):
            for ours, theirs in (_GATED | _OWN_BIASES).items():
                there = f"{run}.ffd_layer.{self.index}.{theirs}"
                yield f"{self.ours}.branches.{branch}.{ours}", there, ours not in _OWN_BIASES


def _units(counts: Mapping[str, int]) -> Iterator[_Unit]:
    for role in ("encoder", "decoder"):
        for index in range(counts.get("fusion_num_layer", 0)):
            yield _Unit(f"{role}.fusion.{index}", (f"{role}.fusion_layer",), index)
        for index in range(counts.get("sep_num_layer", 0)):
            yield _Unit(f"{role}.branches.{index}", tuple(f"{role}.{part}_layer" for part in PARTS), index)
    for ours, theirs in _RUNS.items():
        for step in range(counts.get("ista_iter_num", 0)):
            for index in range(counts.get("ista_layer_num", 0)):
                place = f"decoder.bottleneck.{ours}.{step}.{index}"
                yield _Unit(place, (f"{_BOTTLENECK}.{theirs}.{step}",), index)


def _pixel_layers() -> Iterator[tuple[str, str, float]]:
    """Names here and there of the layers next to the pixels, and the factor of a tensor on the way to ours."""
    for place in (f"{medium}_{part}" for medium in ("video", "image") for part in PARTS):
        yield f"encoder.{place}.weight", f"encoder.{place}_proj.1.weight", PIXEL_RANGE
        yield f"encoder.{place}.bias", f"encoder.{place}_proj.1.bias", 1.0
        yield f"decoder.{place}.weight", f"decoder.{place}_proj.0.weight", 1 / PIXEL_RANGE
        yield f"decoder.{place}.bias", f"decoder.{place}_proj.0.bias", 1 / PIXEL_RANGE


def to_ours(tensors: Mapping[str, Tensor], _config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a released file under our paths; unknown ones are kept as they are."""
    rest, found = dict(tensors), dict[str, Tensor]()
    for unit in _units(depths(tensors)):
        for end in ("weight", "bias"):
            names = unit.depthwise(end)
            if all(name in rest for name in names):
                found[f"{unit.ours}.depthwise.{end}"] = torch.cat([rest.pop(name) for name in names])
        for ours, theirs, is_released in unit.gated():
            if theirs in rest:
                found[ours] = rest.pop(theirs)
            elif not is_released and (weight := found.get(f"{ours.removesuffix('.bias')}.weight")) is not None:
                found[ours] = weight.new_zeros(weight.shape[0])
    for ours, theirs, factor in _pixel_layers():
        if theirs in rest:
            found[ours] = rest.pop(theirs) * factor
    _read_bottleneck(rest, found)
    return rest | found


def _read_bottleneck(rest: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    phi, start = rest.pop(_PHI, None), rest.pop(f"{_BOTTLENECK}.Q", None)
    if phi is not None and start is not None:
        found["decoder.bottleneck.measure.weight"], found["decoder.bottleneck.start.weight"] = phi, start
        found["decoder.bottleneck.measure.bias"] = rest.pop(_PHI_BIAS, phi.new_zeros(phi.shape[0]))
        found["decoder.bottleneck.start.bias"] = rest.pop(_START_BIAS, phi.new_zeros(start.shape[0]))
    for ours, theirs in (("steps", "weights"), ("thresholds", "threshold")):
        numbers: list[Tensor] = []
        while (name := f"{_BOTTLENECK}.{theirs}.{len(numbers)}") in rest:
            number = rest.pop(name)
            if number.numel() != 1:
                raise ValueError(f"{name} has the shape {list(number.shape)}, expected a single number")
            numbers.append(number.reshape(1))
        if numbers:
            found[f"decoder.bottleneck.{ours}"] = torch.cat(numbers)
    mean = rest.pop(_OTHER_PHI, phi)
    if mean is not None and "std_layer.weight" in rest and "std_layer.bias" in rest:
        bias = rest.pop(_MEAN_BIAS, mean.new_zeros(mean.shape[0]))
        moments = torch.cat([mean, rest.pop("std_layer.weight")])
        found["encoder.quant.weight"] = moments[:, :, None, None, None]
        found["encoder.quant.bias"] = torch.cat([bias, rest.pop("std_layer.bias")])


def to_theirs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `to_ours`. Biases that no released file has are left out if they are zero."""
    rest, found = dict(tensors), dict[str, Tensor]()
    for unit in _units(_own_depths(tensors)):
        for end in ("weight", "bias"):
            whole = rest.pop(f"{unit.ours}.depthwise.{end}", None)
            if whole is not None:
                widths = [len(rest[f"{unit.ours}.branches.{i}.norm.weight"]) for i in range(len(unit.runs))]
                found |= zip(unit.depthwise(end), whole.split(widths), strict=True)
        for ours, theirs, is_released in unit.gated():
            _put(found, theirs, rest.pop(ours, None), even_zeros=is_released)
    for ours, theirs, factor in _pixel_layers():
        if ours in rest:
            found[theirs] = rest.pop(ours) / factor
    _write_bottleneck(rest, found)
    return rest | found


def _put(found: dict[str, Tensor], name: str, tensor: Tensor | None, *, even_zeros: bool = False) -> None:
    if tensor is not None and (even_zeros or bool(tensor.any())):
        found[name] = tensor


def _write_bottleneck(rest: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    place = "decoder.bottleneck"
    _put(found, _PHI, rest.pop(f"{place}.measure.weight", None), even_zeros=True)
    _put(found, f"{_BOTTLENECK}.Q", rest.pop(f"{place}.start.weight", None), even_zeros=True)
    _put(found, _PHI_BIAS, rest.pop(f"{place}.measure.bias", None))
    _put(found, _START_BIAS, rest.pop(f"{place}.start.bias", None))
    for step, number in enumerate(rest.pop(f"{place}.steps", ())):
        found[f"{_BOTTLENECK}.weights.{step}"] = number.reshape(())
    for step, number in enumerate(rest.pop(f"{place}.thresholds", ())):
        found[f"{_BOTTLENECK}.threshold.{step}"] = number.reshape(1)
    if (moments := rest.pop("encoder.quant.weight", None)) is not None:
        mean, variance = moments.flatten(1).chunk(2)
        bias, found["std_layer.bias"] = rest.pop("encoder.quant.bias").chunk(2)
        found["std_layer.weight"] = variance
        shared = found.setdefault(_PHI, mean)
        if not torch.equal(shared, mean):  # the decoder's has been trained since
            found[_OTHER_PHI] = mean
        _put(found, _MEAN_BIAS, bias)


def _own_depths(names: Iterable[str]) -> dict[str, int]:
    patterns = {
        "sep_num_layer": r"coder\.branches\.(\d+)\.",
        "fusion_num_layer": r"coder\.fusion\.(\d+)\.",
        "ista_iter_num": r"bottleneck\.analysis\.(\d+)\.",
        "ista_layer_num": r"bottleneck\.analysis\.\d+\.(\d+)\.",
    }
    names = list(names)
    numbers = {key: [int(m[1]) for name in names if (m := re.search(p, name))] for key, p in patterns.items()}
    return {key: max(found) + 1 for key, found in numbers.items() if found}


def _places(role: str) -> dict[str, str]:
    outer = {"decoder": {"bottleneck.0": "decoder.bottleneck", "head.0": "decoder"}}
    outer["encoder"] = {"stem.0": "encoder", "quant.0": "encoder.quant"}
    stages = ("fusion", "branches")
    return outer[role] | {f"{s}.{i}": f"{role}.{s}.{i}" for s in stages for i in range(MAX_STAGE_BLOCKS)}


def _landmarks(role: str, position: int) -> tuple[str, ...]:
    layers = (f"{medium}_{part}_proj.{position}" for medium in ("video", "image") for part in PARTS)
    return tuple(f"{role}.{layer}.{end}" for layer in layers for end in ("weight", "bias"))


LEANVAE_ORIGINAL = Layout(
    name="leanvae-original",
    family=NAME,
    places={"decoder": _places("decoder"), "encoder": _places("encoder")},
    layers={"conv": {"conv": ""}, "naf": {}, "ista": {}, "cell_stem": {}, "cell_head": {}},
    landmarks={"decoder": _landmarks("decoder", 0), "encoder": _landmarks("encoder", 1)},
    prepare=to_ours,
    implied=depths,
    finish=to_theirs,
)
