"""Hostile and damaged files of tensors: refused fast, in little memory, with one short message."""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flashvaed_cli.errors import MediaError, TensorFileError
from flashvaed_cli.limits import MAX_INDEX_BYTES, MAX_MESSAGE_CHARS, MAX_PICKLE_BYTES, MAX_TENSORS
from flashvaed_cli.untrusted.files import parse_json
from flashvaed_cli.untrusted.pytorch_file import load_pytorch
from flashvaed_cli.untrusted.safetensors_file import load_safetensors, read_index


@contextmanager
def refused(match: str, *, memory_mb: float = 100) -> Iterator[None]:
    """A refusal within the promised memory and message length (time is a bench's business, but for a wide bound)."""
    tracemalloc.start()
    start = time.monotonic()
    try:
        with pytest.raises(TensorFileError, match=match) as caught:
            yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) <= MAX_MESSAGE_CHARS
    assert peak < memory_mb * 1e6
    assert time.monotonic() - start < 30  # tracing slows Python down by ten and more


def zipped(path: Path, data: bytes, *, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    return path


def raw(path: Path, header: object, body: bytes = b"") -> Path:
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


@pytest.mark.parametrize("old", [False, True])
def test_plain_files_are_read(tmp_path: Path, old: bool) -> None:
    tied = torch.randn(3, 4)
    content = {"a": tied, "b": tied, "half": tied.half(), "view": tied.t(), "part": tied[1], "empty": torch.zeros(0, 5)}
    nested = {"state_dict": content, "list": [torch.ones(2), {"epoch": 3}], "rate": 0.1, "name": "x", "none": None}
    torch.save(nested, tmp_path / "x.pth", _use_new_zipfile_serialization=not old)
    found = load_pytorch(tmp_path / "x.pth")
    assert isinstance(found, dict) and found["rate"] == 0.1
    for name, tensor in content.items():
        assert torch.equal(found["state_dict"][name], tensor)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))])
    optimizer.param_groups[0]["params"][0].sum().backward()
    optimizer.step()
    torch.save({"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, tmp_path / "y.pth")
    assert isinstance(load_pytorch(tmp_path / "y.pth"), dict)


@pytest.mark.parametrize("old", [False, True])
def test_expanded_tensors(tmp_path: Path, old: bool) -> None:
    path = tmp_path / "x.pth"
    torch.save(torch.zeros(1).expand(1, 16, 1000, 1000, 1000), path, _use_new_zipfile_serialization=not old)
    with refused(r"shape \[1, 16, 1000, 1000, 1000\] would fill 64000000000 bytes from 4 .*contiguous"):
        load_pytorch(path)
    base = torch.zeros(1000)
    torch.save({"x": {i: base.as_strided((500, 2), (1, 1)) for i in range(50)}}, path)  # each as large as its storage
    with refused("repeats its values"):
        load_pytorch(path)


def test_tensors_that_are_not_dense(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    indices = torch.zeros(2, 1, dtype=torch.long)
    sparse = torch.sparse_coo_tensor(indices, torch.ones(1), (10**6, 10**6), check_invariants=True)
    for tensor in (sparse, torch.empty(10**6, 10**6, device="meta")):
        torch.save({"w": tensor}, path)
        with refused("dense tensors|without data"):
            load_pytorch(path)


def test_storages_larger_than_their_data(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"w": torch.zeros(300)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    name = next(name for name in records if name.endswith("data.pkl"))
    lying = records[name].replace(b"M" + struct.pack("<H", 300), b"J" + struct.pack("<i", 2_000_000_000))
    assert lying != records[name]
    with zipfile.ZipFile(path, "w") as archive:
        for record, data in (records | {name: lying}).items():
            archive.writestr(record, data)
    with refused("takes 8000000000 bytes of 1200"):
        load_pytorch(path)
    torch.save({"w": torch.zeros(300)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(
        path.read_bytes().replace(b"M" + struct.pack("<H", 300), b"J" + struct.pack("<i", 2_000_000_000), 1)
    )
    with refused("takes 8000000000 bytes"):
        load_pytorch(path)


def test_pickles_without_end(tmp_path: Path) -> None:
    endless: dict = {}
    endless["state_dict"] = endless
    found = load_pytorch(zipped(tmp_path / "x.pth", pickle.dumps(endless, 2)))
    assert isinstance(found, dict) and found["state_dict"] is found
    deep = b"\x80\x02}(" + b"N" + b"\x85" * 200_000 + b"K\x01u."
    with refused("tuples nested deeper"):
        load_pytorch(zipped(tmp_path / "x.pth", deep))
    start = time.monotonic()
    with pytest.raises(TensorFileError, match="more than 600000 steps"):
        load_pytorch(zipped(tmp_path / "x.pth", b"\x80\x02" + b"N0" * 3_000_000 + b"N."))
    assert time.monotonic() - start < 10  # 0.6 s where nothing else runs


def test_compressed_and_crowded_archives(tmp_path: Path) -> None:
    bomb = zipped(tmp_path / "x.pth", bytes(4 * MAX_PICKLE_BYTES), compression=zipfile.ZIP_DEFLATED)
    with refused("compressed"):
        load_pytorch(bomb)
    with refused(f"where at most {MAX_PICKLE_BYTES}", memory_mb=20):
        load_pytorch(zipped(tmp_path / "x.pth", bytes(MAX_PICKLE_BYTES + 1)))
    many = tmp_path / "many.pth"
    many.write_bytes(b"PK" + bytes(50) + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 65_000, 65_000, 100, 4, 0))
    with refused("65000 files in one archive"):
        load_pytorch(many)


def test_pickles_that_run_code_are_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    for protocol in (2, 4):
        with pytest.raises(TensorFileError, match=r"could run code|cannot be read"):
            load_pytorch(zipped(tmp_path / "x.pth", pickle.dumps({"w": Evil()}, protocol)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"a": {"data_offsets": [0]}}, "entry 'a' has no valid shape"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, "does not fit its data_offsets"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "no valid shape"),
        ({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}, "cannot read its tensors"),
        ({"a": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}, "cannot read its tensors"),
        ({"a": None}, "entry 'a'"),
        ({"__metadata__": [1]}, "no mapping of texts"),
        ({"__metadata__": {"a": {}}}, "no mapping of texts"),
        ('{"__metadata__":' + "[" * 990 + "]" * 990 + "}", "nested deeper"),
        ('{"a":' + "[" * 5000, "nested deeper"),
        ("{" + "\x00", "no JSON"),
        ('{"a": "\ud800"}'.encode("utf-8", "surrogatepass").decode("latin-1"), "entry 'a'"),
    ],
)
def test_damaged_indexes(tmp_path: Path, header: object, match: str) -> None:
    with refused(match):
        load_safetensors(raw(tmp_path / "x.safetensors", header, bytes(4)))


def test_metadata_may_be_null(tmp_path: Path) -> None:
    assert read_index(raw(tmp_path / "x.safetensors", {"__metadata__": None})).metadata == {}


def test_huge_indexes(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    crowded = raw(tmp_path / "x.safetensors", {f"t{i}": entry for i in range(MAX_TENSORS + 1)})
    with refused(f"{MAX_TENSORS + 1} tensors"):
        load_safetensors(crowded)
    with refused("more than 600000 values"):
        load_safetensors(raw(tmp_path / "x.safetensors", '{"a":[' + "0," * 700_000 + "0]}"))
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{")
    with refused(f"more than {MAX_INDEX_BYTES}"):
        load_safetensors(path)


def test_truncated_files(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(100)}, path)
    whole = path.read_bytes()
    for size in (0, 3, 8, 20, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(MediaError):
            load_safetensors(path)


def test_pipes_and_devices_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for load in (load_safetensors, load_pytorch):
        with refused("a pipe, not a file"):
            load(tmp_path / "pipe")
        with refused("a device"):
            load(Path("/dev/zero"))


def test_json_has_limits() -> None:
    assert parse_json(b'{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    for text in ("[" * 99 + "]" * 99, "[" * 10**5, '"\\"' * 10**5):
        with pytest.raises(ValueError):
            parse_json(text)


def test_an_archive_whose_records_begin_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"w": torch.zeros(3)}, path)
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\x06\x06") + 48  # where the archive says that its list of records begins
    (offset,) = struct.unpack_from("<Q", data, end)
    struct.pack_into("<Q", data, end, offset + 1000)
    path.write_bytes(data)
    with refused("cannot be read as a PyTorch file"):
        load_pytorch(path)
