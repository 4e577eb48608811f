from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flashvaed_cli.decoders.spec.blocks import ResBlockSpec
from flashvaed_cli.decoders.spec.coders import CoderSpec
from flashvaed_cli.decoders.spec.groups import (
    ChannelGroup,
    channel_groups,
    compose_kept,
    consumers,
    producers,
    tensor_widths,
)
from flashvaed_cli.families.registry import FAMILIES
from flashvaed_cli.families.wan21.spec import wan_encoder_spec
from tests.toy import DECODER_SPECS, original_spec, toy_decoder, toy_latents


def test_groups_of_wan() -> None:
    groups = channel_groups(original_spec())
    streams = [group for group in groups if not group.name.endswith(".inner")]
    assert streams == [
        ChannelGroup("mid.stream", "mid", 16, ("conv_in.0", "mid.0", "mid.1", "mid.2")),
        ChannelGroup("up0.stream", "up0", 16, ("up0.0", "up0.1", "up0.2")),
        ChannelGroup("up1.entry", "up1", 8, ("up0.3",)),
        ChannelGroup("up1.stream", "up1", 16, ("up1.0", "up1.1", "up1.2")),
        ChannelGroup("up2.stream", "up2", 8, ("up1.3", "up2.0", "up2.1", "up2.2")),
        ChannelGroup("up3.stream", "up3", 4, ("up2.3", "up3.0", "up3.1", "up3.2")),
    ]
    inner = [group for group in groups if group.name.endswith(".inner")]
    blocks = {a: b for a, b in original_spec().blocks() if isinstance(b, ResBlockSpec)}
    assert inner == [
        ChannelGroup(f"{a}.inner", a.split(".")[0], b.conv1.out_width, (f"{a}.conv1",)) for a, b in blocks.items()
    ]


@pytest.mark.parametrize("name", DECODER_SPECS)
def test_every_tensor_has_one_group_and_its_width(name: str) -> None:
    decoder = toy_decoder(DECODER_SPECS[name])
    widths: dict[str, int] = {}

    def hook_of(tensor: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, output: widths.update({tensor: output.shape[1]})

    for tensor in tensor_widths(decoder.spec):
        decoder.at(tensor).register_forward_hook(hook_of(tensor))
    decoder(toy_latents(2, 1, 2))
    assert widths == tensor_widths(decoder.spec)
    tensors = [tensor for group in channel_groups(decoder.spec) for tensor in group.tensors]
    assert len(tensors) == len(set(tensors))
    assert "post_quant.0" not in widths and "head.0" not in widths


@pytest.mark.parametrize("name", FAMILIES)
def test_what_leaves_a_coder_is_in_no_group(name: str) -> None:
    """Pixels and latents have their channels, also where a layer comes after the head, as in Stable Video Diffusion."""
    family = FAMILIES[name]
    for spec in (family.decoder_spec(32, family.latent_width), family.encoder_spec(32, family.latent_width)):
        blocks = list(spec.blocks())
        heads = [index for index, (_, block) in enumerate(blocks) if block.kind == "head"]
        outputs = {address for address, _ in blocks[min([*heads, len(blocks) - 1]) :]}
        assert not outputs & {tensor for group in channel_groups(spec) for tensor in group.tensors}


def test_entry_of_a_pruned_stage_is_a_group_of_its_own() -> None:
    groups = {group.name: group for group in channel_groups(DECODER_SPECS["pruned"])}
    assert groups["up3.entry"] == ChannelGroup("up3.entry", "up3", 3, ("up2.3",))
    assert groups["up3.stream"].tensors == ("up3.0", "up3.1", "up3.2")


def test_compose_kept_of_known_sets() -> None:
    first = {"a": (1, 3, 5, 7), "b": (0, 2)}
    second = {"a": (0, 3), "c": (4,)}
    assert compose_kept(first, second) == {"a": (1, 7), "b": (0, 2), "c": (4,)}
    assert first == {"a": (1, 3, 5, 7), "b": (0, 2)}


@given(st.data())
def test_compose_kept_is_indexing_twice(data: st.DataObject) -> None:
    channels = list(range(data.draw(st.integers(1, 12))))
    first = data.draw(st.lists(st.sampled_from(channels), min_size=1, unique=True).map(sorted))
    second = data.draw(st.lists(st.integers(0, len(first) - 1), min_size=1, unique=True).map(sorted))
    composed = compose_kept({"a": tuple(first)}, {"a": tuple(second)})
    once = [channels[i] for i in first]
    assert composed == {"a": tuple(once[i] for i in second)}
    assert compose_kept({}, composed) == compose_kept(composed, {}) == composed


def consumers_of(name: str, spec: CoderSpec) -> list[tuple[str | None, str | None]]:
    group = next(group for group in channel_groups(spec) if group.name == name)
    return [(one.layer, one.norm) for one in consumers(spec, group)]


def test_producers_and_consumers_of_wan() -> None:
    spec = original_spec()
    groups = {group.name: group for group in channel_groups(spec)}
    assert producers(spec, groups["mid.stream"]) == ["conv_in.0.conv", "mid.0.conv2", "mid.1.proj", "mid.2.conv2"]
    assert producers(spec, groups["up1.entry"]) == ["up0.3.spatial"]
    assert producers(spec, groups["up1.stream"]) == ["up1.0.conv2", "up1.0.shortcut", "up1.1.conv2", "up1.2.conv2"]
    assert producers(spec, groups["up3.0.inner"]) == ["up3.0.conv1"]
    assert consumers_of("mid.stream", spec) == [
        ("mid.0.conv1", "mid.0.norm1"), ("mid.1.qkv", "mid.1.norm"), ("mid.2.conv1", "mid.2.norm1"),
        ("up0.0.conv1", "up0.0.norm1"), (None, None),
    ]  # fmt: skip
    assert consumers_of("up1.entry", spec) == [("up1.0.conv1", "up1.0.norm1"), ("up1.0.shortcut", None)]
    assert consumers_of("up2.stream", spec)[-1] == ("up2.3.spatial", None)
    assert consumers_of("up3.stream", spec)[-1] == ("head.0.conv", "head.0.norm")
    assert consumers_of("up3.0.inner", spec) == [("up3.0.conv2", "up3.0.norm2")]
    encoder = wan_encoder_spec(4, 4)
    assert consumers_of("down0.stream", encoder)[-1] == ("down0.2.spatial", None)
    groups = {group.name: group for group in channel_groups(encoder)}
    assert {"down1.2.temporal", "down0.2.spatial"} <= {a for g in groups.values() for a in producers(encoder, g)}


@pytest.mark.parametrize("name", DECODER_SPECS)
def test_every_group_has_producers_and_consumers_of_its_width(name: str) -> None:
    decoder = toy_decoder(DECODER_SPECS[name])
    read: list[str] = []
    for group in channel_groups(decoder.spec):
        written = producers(decoder.spec, group)
        assert written and len(set(written)) == len(written)
        for address in written:
            assert len(decoder.at(address).get_parameter("weight")) == group.width
        found = consumers(decoder.spec, group)
        assert found
        for one in found:
            if one.layer is not None:
                assert decoder.at(one.layer).get_parameter("weight").shape[1] == group.width
                read.append(one.layer)
            if one.norm is not None:
                assert decoder.at(one.norm).get_parameter("gamma").shape == (group.width,)
    # Every layer reads one group, except those that read the latent.
    layers = [address for address, _ in decoder.spec.layers()] + ["mid.1.qkv"]
    assert sorted(read) == sorted(set(layers) - {"post_quant.0.conv", "conv_in.0.conv"})
