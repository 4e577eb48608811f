"""Choose a VAE's weights in a file: training programs store several sets, such as a running average."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from flashvaed_cli.artifact.foreign.recognition import PREFIXES, common_prefix
from flashvaed_cli.errors import ArtifactError

EMA = "ema"
"""The word of `--weights` for averaged weights, whatever their name in the file."""

# Prefixes in files with a whole model: of its diffusion model, and of its VAE.
_DIFFUSION_MODEL, _VAES = "model.diffusion_model.", ("vae.", "first_stage_model.")
# Keys under which training programs keep the weights, likeliest first.
_KEYS = ("state_dict", "model", "model_state_dict", "module", "vae", "weights", "params", "generator", "net")
_AVERAGED = re.compile(r"(^|[._/-])(ema|averaged?|shadow)(?=$|[._/-])|_ema\b|\bema_|^g_ema", re.IGNORECASE)
_CODER = re.compile(r"(?:^|\.)(?:decoder|encoder)\.")
_WRAPPER_PARTS = frozenset(
    (*(prefix.rstrip(".") for prefix in PREFIXES), *_KEYS, "_forward_module", "autoencoder", "student", EMA)
)
_DEEPEST = 6


@dataclass(frozen=True)
class WeightSet:
    """One set of weights in a file: its name there ("" if it is the only one), and its tensors."""

    name: str
    tensors: dict[str, Tensor]

    @property
    def is_averaged(self) -> bool:
        """Whether the name says that this is a running average."""
        return _AVERAGED.search(self.name) is not None


def choose_weights(content: object, location: str, wanted: str | None) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of one VAE, under names without wrappers, and a note if there was a choice.

    Args:
        content: of the file: a state dict, or dicts around one or several.
        wanted: the file's name for a set, or `ema`; None: the first that is not a running average.
    Raises:
        ArtifactError: it holds no state dict, or none with the name `wanted`.
    """
    sets = _sets_in(content)
    if not sets:
        sets = [WeightSet("", tensors)] if (tensors := _plain_state(content)) else []
    if not sets:
        keys = ""
        if isinstance(content, Mapping):
            listed = ", ".join(f"{key!s:.60}" for key in list(content)[:8])
            keys = f" with the keys {listed}" if content else " without entries"
        raise ArtifactError(
            f"{location}: holds a {type(content).__name__}{keys}, not a state dict. "
            "Save the VAE's state dict as safetensors."
        )
    chosen = _chosen(sets, location, wanted)
    others = ", ".join(dict.fromkeys(one.name or "its plain names" for one in sets if one is not chosen))
    note = None
    if others:
        averaged = next((one for one in sets if one.is_averaged), None)
        advice = ""
        if wanted is None and averaged is not None and averaged is not chosen:
            advice = " (--weights ema takes the averaged ones, which are usually better)"
        note = f"read its weights '{chosen.name}'; it also holds {others}{advice}"
    return _whole_names(chosen.tensors), note


def _chosen(sets: list[WeightSet], location: str, wanted: str | None) -> WeightSet:
    plain_first = sorted(sets, key=lambda one: one.is_averaged)
    if wanted is None:
        return plain_first[0]
    named = [one for one in sets if one.name == wanted] or [one for one in sets if one.name.endswith(f".{wanted}")]
    if not named and wanted == EMA:
        named = [one for one in sets if one.is_averaged]
    if not named:
        listed = ", ".join(dict.fromkeys(one.name for one in sets if one.name))
        there = f"it holds {listed}" if listed else "it holds one set of weights, without a name"
        raise ArtifactError(f"{location}: has no weights called {wanted}: {there}. Leave --weights out, or name one.")
    return named[0]


def _sets_in(content: object) -> list[WeightSet]:
    """Every set of tensors with names like a coder's, in nested dicts, likeliest first."""
    found: list[WeightSet] = []
    waiting: list[tuple[str, object, int]] = [("", content, 0)]
    seen: set[int] = set()
    while waiting:
        name, box, depth = waiting.pop(0)
        if not isinstance(box, Mapping) or id(box) in seen or depth > _DEEPEST:
            continue
        seen.add(id(box))
        tensors = {str(key): value for key, value in box.items() if isinstance(value, Tensor)}
        found += _split_by_prefix(name, tensors)
        inner = [key for key, value in box.items() if isinstance(value, Mapping) and isinstance(key, str)]
        inner.sort(key=lambda key: _KEYS.index(key) if key in _KEYS else len(_KEYS))
        waiting += [(f"{name}.{key}".removeprefix("."), box[key], depth + 1) for key in inner[:64]]
    return found


def _split_by_prefix(name: str, tensors: dict[str, Tensor]) -> list[WeightSet]:
    """The sets in one flat state dict: that without a wrapper, and that under each known or averaging wrapper."""
    prefixes: dict[str, None] = {}
    for key in tensors:
        if coder := _CODER.search(key):
            prefix = key[: coder.start() + 1] if coder.start() else ""
            prefix = "" if prefix == "." else prefix
            if all(part in _WRAPPER_PARTS or _AVERAGED.search(part) for part in prefix.split(".")[:-1]):
                prefixes[prefix] = None
    if len(prefixes) <= 1 and not any(_is_foreign(key, *prefixes) for key in tensors for _ in prefixes):
        return [WeightSet(name, tensors)] if prefixes else []
    sets = []
    for prefix in prefixes:
        longer = tuple(other for other in prefixes if other != prefix and other.startswith(prefix))
        own = {
            key: value
            for key, value in tensors.items()
            if key.startswith(prefix) and not (longer and key.startswith(longer))
        }
        sets.append(WeightSet(f"{name}.{prefix}".strip("."), own))
    return sets


def _is_foreign(key: str, prefix: str) -> bool:
    """Whether a tensor is outside the wrapped VAE, like a discriminator's in a trainer's file."""
    return prefix != "" and not key.startswith(prefix)


def _plain_state(content: object) -> dict[str, Tensor]:
    """Tensors under the usual keys whose names are not like a coder's, to report what they look like."""
    for _ in range(_DEEPEST):
        if not isinstance(content, Mapping):
            return {}
        wrapper = next((key for key in _KEYS if isinstance(content.get(key), Mapping)), None)
        if wrapper is None:
            return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
        content = content[wrapper]
    return {}


def _whole_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the wrapper that all names share; of a file with a whole model, those of its VAE."""
    if any(name.startswith((_DIFFUSION_MODEL, "vae.per_channel_statistics.")) for name in tensors):
        wrapper = next((part for part in _VAES if any(name.startswith(part) for name in tensors)), "")
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(wrapper)}
    prefix = _shared_wrapper(tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def _shared_wrapper(names: Iterable[str]) -> str:
    """The wrapper of all names, of known parts or of those that an averaged copy adds."""
    names = list(names)
    prefix = common_prefix(dict.fromkeys(names))
    first = names[0] if names else ""
    while True:
        part = first[len(prefix) :].partition(".")[0]
        longer = f"{prefix}{part}."
        is_wrapper = part in _WRAPPER_PARTS or _AVERAGED.search(part) is not None
        if not is_wrapper or not all(name.startswith(longer) for name in names):
            return prefix
        prefix = longer
