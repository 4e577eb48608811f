"""Changes to well-formed inputs that keep most of their structure, as hypothesis strategies."""

from __future__ import annotations

import copy
import io
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

Draw = Callable[[st.SearchStrategy[Any]], Any]

ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**63, -(2**63), 10**400, 1e-300, 1e300, 0.1, -0.0, float("nan"), float("inf")]),
    st.text(max_size=4),
    st.sampled_from(["NaN", "4", "a.b", "../x", "\x00", "é" * 300, "wan2.1", "sdxl", "causal3d", "builtin:tiny-wan"]),
    st.sampled_from([[], {}, [[]], [None], [0], {"kind": "conv"}, {"": 0}]),
)
"""Values that a field seldom has: of other types, too large, not finite, in another container."""

_SHAPES = st.lists(st.integers(0, 9), max_size=6)
_DTYPES = st.sampled_from(
    [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64, torch.uint8]
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside nested dicts and lists."""
    if isinstance(value, dict):
        items: list[tuple[Any, Any]] = list(value.items())
    else:
        items = list(enumerate(value)) if isinstance(value, list) else []
    return [place for key, item in items for place in ((*path, key), *_places(item, (*path, key)))]


@st.composite
def documents(draw: Draw, document: Any) -> Any:
    """A copy of nested dicts and lists with up to three values replaced, removed, renamed, repeated or exchanged."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(changed)
        if not places:
            break
        *path, key = draw(st.sampled_from(places))
        holder: Any = changed
        for part in path:
            holder = holder[part]
        action = draw(st.sampled_from(["replace", "replace", "remove", "rename", "repeat", "exchange"]))
        if action == "replace":
            holder[key] = copy.deepcopy(draw(ODD_VALUES))  # a container that is drawn twice is one object
        elif action == "remove":
            del holder[key]
        elif action == "rename" and isinstance(holder, dict):
            holder[draw(st.text(max_size=6))] = holder.pop(key)
        elif action == "repeat" and isinstance(holder, list):
            holder[key:key] = [copy.deepcopy(holder[key])] * draw(st.sampled_from([1, 2, 300]))
        elif action == "exchange":
            other = draw(st.sampled_from(places))
            value: Any = changed
            for part in other:
                value = value[part] if _has(value, part) else None
            holder[key] = copy.deepcopy(value)
    return changed


def _has(value: Any, part: Any) -> bool:
    return (isinstance(value, dict) and part in value) or (
        isinstance(value, list) and isinstance(part, int) and part < len(value)
    )


@st.composite
def state_dicts(draw: Draw, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of named tensors with up to three of another shape, dtype, name or value, absent, or beside a new one."""
    changed = dict(tensors)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(changed) or ["x"]))
        tensor = changed.get(name, torch.zeros(1))
        action = draw(
            st.sampled_from(["shape", "shape", "axis", "dtype", "value", "remove", "rename", "prefix", "add"])
        )
        if action == "shape":
            changed[name] = torch.ones(draw(_SHAPES), dtype=tensor.dtype)
        elif action == "axis" and tensor.dim():
            shape = list(tensor.shape)
            shape[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(0, 9))
            changed[name] = torch.ones(shape, dtype=tensor.dtype)
        elif action == "dtype":
            real = tensor.real if tensor.is_complex() else tensor
            changed[name] = real.to(torch.float32).to(draw(_DTYPES))
        elif action == "value":
            value = draw(st.sampled_from([float("nan"), float("inf"), 1e30, 0.0]))
            changed[name] = torch.full_like(tensor, value if tensor.is_floating_point() else 1)
        elif action == "remove":
            changed.pop(name, None)
        elif action == "rename":
            start, _, end = name.rpartition(".")
            changed[f"{start}{draw(st.sampled_from(['', '.', '.7.', '.conv.', '.0.0.', '.99999.']))}{end}"] = tensor
            changed.pop(name, None)
        elif action == "prefix":
            prefix = draw(st.sampled_from(["module.", "vae.", "model.", "encoder.", "decoder.", "first_stage_model."]))
            names = sorted(changed) if draw(st.booleans()) else [name]
            changed = {(f"{prefix}{one}" if one in names else one): tensor for one, tensor in changed.items()}
        else:
            changed[draw(st.sampled_from(["x", "", "decoder.x.weight", f"{name}.weight"]))] = torch.ones(2)
    return changed


@st.composite
def blobs(draw: Draw, data: bytes) -> bytes:
    """Bytes with a few changed, cut off, repeated or put in between; most changes near the start, where headers are."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        near = draw(st.booleans())
        place = draw(st.integers(0, max(min(len(changed), 64 if near else len(changed)) - 1, 0)))
        action = draw(st.sampled_from(["set", "set", "cut", "repeat", "insert"]))
        if action == "set" and changed:
            changed[place] = draw(st.integers(0, 255))
        elif action == "cut":
            del changed[place : place + draw(st.sampled_from([1, 8, 10**9]))]
        elif action == "repeat":
            changed[place:place] = changed[place : place + 64]
        else:
            changed[place:place] = draw(st.binary(max_size=9))
    return bytes(changed)


@st.composite
def pickles(draw: Draw, data: bytes) -> bytes:
    """A pickle with up to three operations left out, repeated, exchanged for another, or with changed arguments."""
    steps = [(step.name, place or 0) for step, _, place in pickletools.genops(data)]
    ends = [place for _, place in steps[1:]] + [len(data)]
    parts = [data[place:end] for (_, place), end in zip(steps, ends, strict=True)]
    codes = [operation.code.encode("latin1") for operation in pickletools.opcodes]
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(parts) - 1))
        action = draw(st.sampled_from(["remove", "repeat", "code", "argument", "insert"]))
        if action == "remove":
            parts[place] = b""
        elif action == "repeat":
            parts[place] *= draw(st.sampled_from([2, 100]))
        elif action == "code":
            parts[place] = draw(st.sampled_from(codes)) + parts[place][1:]
        elif action == "argument" and len(parts[place]) > 1:
            parts[place] = parts[place][:1] + draw(blobs(parts[place][1:]))
        else:
            parts[place] = draw(st.sampled_from(codes)) + draw(st.binary(max_size=4)) + parts[place]
    return b"".join(parts)


@st.composite
def archives(draw: Draw, data: bytes) -> bytes:
    """A file of `torch.save` with its pickle, one of its other records or its own bytes changed."""
    if draw(st.integers(0, 3)) == 0:
        return draw(blobs(data))
    source = zipfile.ZipFile(io.BytesIO(data))
    names = source.namelist()
    chosen = draw(st.sampled_from([*[name for name in names if name.endswith("data.pkl")] * 4, *names]))
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as target:
        for name in names:
            record = source.read(name)
            if name == chosen:
                record = draw(pickles(record)) if name.endswith(".pkl") else draw(blobs(record))
            target.writestr(name, record)
    return written.getvalue()
