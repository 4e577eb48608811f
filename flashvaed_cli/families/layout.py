"""A program's names for a family's tensors, as data: the place of every block, and of every layer inside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

Role = Literal["decoder", "encoder"]


@dataclass(frozen=True)
class Layout:
    """One way of naming the tensors of a family.

    Attributes:
        places: per role, block address to the foreign name of the block (two blocks may share one); a stage's bypass
            has the address `STAGE.bypass`.
        layers: per kind of block, our layer name to the foreign name inside the block ("": the block itself).
        config_class: `_class_name` of the configuration that comes with such weights; None if none does.
        gain: the name of a norm's gain; its shift is `bias`.
        by_blocks: no name is common to all variants; the layout is recognised by the places of its blocks.
        is_shifted: for a layout recognised by its blocks: the norms have shifts, or tensors that become shifts.
        prepare: turns the tensors found, with the configuration, into those that this layout names.
        implied: what a file's names say beyond its configuration, as keys of a configuration.
        finish: the reverse of `prepare`, for files that other programs read.
        statistics: names of the latents' mean and deviation among the weights; None: they are not there.
        variance_eps: the second of `statistics` is a variance, and the deviation the root of it plus this; None: it is
            the deviation itself.
        other_statistics: further pairs of names for them in some files.
        prefix: of all names in the program's own files.
        denied: for a layout that shares its names with another: what in shapes and configuration rules it out; None:
            nothing.
        statistics_config: latent mean and deviation as keys of its class's configuration, if these differ from
            `latents_mean` and `latents_std`.
        model: what messages call a model with these names, whatever its version; "" if no name identifies it.
        model_names: names that identify it.
        condition: names of the tensors that a norm's gain and shift are conditioned on.
        landmarks: by role, names that every variant has, if not those of norms and resamplers.
        arguments: the constructor arguments of `config_class`, of the keys that the family knows.
        settings: values of keys that the class shares with another class.
    """

    name: str
    family: str
    places: Mapping[Role, Mapping[str, str]]
    layers: Mapping[str, Mapping[str, str]]
    config_class: str | None = None
    gain: str = "gamma"
    by_blocks: bool = False
    is_shifted: bool = False
    prepare: Callable[[Mapping[str, Tensor], Mapping[str, Any]], dict[str, Tensor]] | None = None
    implied: Callable[[Iterable[str]], dict[str, Any]] | None = None
    finish: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    statistics: tuple[str, str] | None = None
    variance_eps: float | None = None
    other_statistics: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    denied: Callable[[Mapping[str, tuple[int, ...]], Mapping[str, Any]], str | None] | None = None
    statistics_config: Callable[[Sequence[float], Sequence[float]], dict[str, Any]] | None = None
    model: str = ""
    model_names: re.Pattern[str] | None = None
    condition: re.Pattern[str] | None = None
    landmarks: Mapping[Role, tuple[str, ...]] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def layer_place(self, role: Role, address: str, kind: str, layer: str) -> str:
        """The foreign name of a layer, without `.weight`."""
        place, name = self.places[role][address], self.layers[kind][layer]
        return f"{place}.{name}" if name else place
