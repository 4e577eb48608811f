from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from flashvaed_cli.errors import MediaError
from flashvaed_cli.media import latent_cache
from flashvaed_cli.media.cache_key import CacheKey, FileStamp, cache_misfits, stamp_file
from flashvaed_cli.media.cuts import Bucket, ClipSize, CutSettings
from flashvaed_cli.media.latent_cache import (
    CachedLatents,
    CacheWriter,
    claim_cache,
    drop_shards,
    is_intact,
    read_cache,
    read_key,
    sole_writer,
)
from flashvaed_cli.media.sources import find_clips

KEY = CacheKey(
    vae="ab" * 32,
    files=(FileStamp("/a.mp4", 100, 5), FileStamp("/b.mp4", 200, 6)),
    latent_scale=None,
    cut=CutSettings((Bucket(17, 64, 96), Bucket(9, 128, None)), True, 8, max_side=None, seed=0),
    dtype="float32",
)


def clip(number: int) -> Tensor:
    return torch.randn(4, 2 + number % 3, 5, 6, generator=torch.Generator().manual_seed(number))


def write(folder: Path, key: CacheKey = KEY, num_clips: int = 8) -> CachedLatents:
    claim_cache(folder, key)
    with sole_writer(folder), CacheWriter(folder, key, warn=pytest.fail) as writer:
        for number in range(num_clips):
            writer.add(number, clip(number))
        return writer.finish({"/b.mp4": "broken"})


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_cache, "SHARD_CLIPS", 3)


@pytest.mark.usefixtures("small_shards")
def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = write(tmp_path / "cache")
    stored = claim_cache(tmp_path / "cache", KEY)
    cached = read_cache(tmp_path / "cache", stored, pytest.fail)
    assert stored == read_key(tmp_path / "cache") == KEY
    assert cached is not None and cached == written
    assert cached.skipped == {"/b.mp4": "broken"}
    assert [len(shard.clips) for shard in cached.shards] == [3, 3, 2]
    assert list(cached.sizes) == list(range(8))
    for number, size in cached.sizes.items():
        assert size == ClipSize(*clip(number).shape[1:])
        assert torch.equal(cached.cut(number, size), clip(number))


@given(number=st.integers(0, 7), t=st.integers(1, 2), h=st.integers(1, 5), w=st.integers(1, 6))
def test_cuts_are_prefixes_and_rectangles(
    tmp_path_factory: pytest.TempPathFactory, number: int, t: int, h: int, w: int
) -> None:
    folder = tmp_path_factory.getbasetemp() / "shared-cache"
    cached = read_cache(folder, KEY, pytest.fail) if folder.exists() else write(folder)
    assert cached is not None
    top, left = 5 - h, 6 - w
    assert torch.equal(cached.cut(number, ClipSize(t, h, w), top, left), clip(number)[:, :t, top:, left:])


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    cached = write(tmp_path, replace(KEY, dtype="float16"), num_clips=1)
    got = cached.cut(0, cached.sizes[0])
    assert got.dtype == torch.float32
    assert torch.equal(got, clip(0).half().float())
    assert (tmp_path / "shard-00000.safetensors").stat().st_size < 2 * clip(0).numel() + 500


@pytest.mark.usefixtures("small_shards")
def test_interrupted_writing_goes_on(tmp_path: Path) -> None:
    claim_cache(tmp_path, KEY)

    def write_some() -> None:
        with CacheWriter(tmp_path, KEY, warn=pytest.fail) as writer:
            for number in range(4):
                writer.add(number, clip(number))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_some()
    assert read_cache(tmp_path, claim_cache(tmp_path, KEY), pytest.fail) is None
    (tmp_path / ".shard-00002.x.safetensors").write_bytes(b"a sibling that a SIGKILL left")
    with CacheWriter(tmp_path, KEY, warn=pytest.fail) as writer:
        assert writer.numbers == {0, 1, 2, 3}  # the last shard was closed on the way out
        for number in range(4, 8):
            writer.add(number, clip(number))
        writer.finish({})
    assert not list(tmp_path.glob(".shard*"))
    cached = read_cache(tmp_path, KEY, pytest.fail)
    assert cached is not None
    assert [torch.equal(cached.cut(n, size), clip(n)) for n, size in cached.sizes.items()] == [True] * 8


def test_a_slow_encoder_loses_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_cache, "SHARD_SECONDS", 0.0)
    claim_cache(tmp_path, KEY)
    CacheWriter(tmp_path, KEY, warn=pytest.fail).add(0, clip(0))  # and no more: killed
    assert CacheWriter(tmp_path, KEY, warn=pytest.fail).numbers == {0}


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("damage", ["flipped", "cut off", "gone"])
def test_damage_is_seen_and_mended(tmp_path: Path, damage: str) -> None:
    cached = write(tmp_path)
    path = tmp_path / cached.shards[1].name
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-9] ^= 1
        path.write_bytes(content)
        assert is_intact(tmp_path, cached.shards[1], content=False)
    elif damage == "cut off":
        path.write_bytes(content[:-9])
    else:
        path.unlink()
    assert [is_intact(tmp_path, shard) for shard in cached.shards] == [True, False, True]
    drop_shards(tmp_path, [cached.shards[1]])
    assert read_cache(tmp_path, KEY, pytest.fail) is None
    with CacheWriter(tmp_path, KEY, warn=pytest.fail) as writer:
        assert writer.numbers == {0, 1, 2, 6, 7}
        for number in (3, 4, 5):
            writer.add(number, clip(number))
        mended = writer.finish({})
    assert torch.equal(mended.cut(4, mended.sizes[4]), clip(4))


def with_another_name(text: str) -> str:
    """As an index without a checksum may have it: dropping damaged shards must not reach outside of the folder."""
    document = json.loads(text.replace("shard-00001", "../precious"))
    del document["sha256"]
    return json.dumps(document)


DAMAGES = {
    "cut off": lambda text: text[: len(text) // 2],
    "empty": lambda text: text[:0],
    "no UTF-8": lambda text: b"\xff\xfe" + text.encode(),
    "another number": lambda text: text.replace('"num_bytes": ', '"num_bytes": 1', 1),
    "a name outside": with_another_name,
    "no object": lambda text: f"[{text}]",
    "brackets": lambda text: "[" * 100_000 + text,
    "nothing in it": lambda text: text[:0] + "{}",
}


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_made_anew_from_the_shards(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "cache"
    written = write(folder, num_clips=12)  # more than ten: numbers and their texts sort differently
    assert read_cache(folder, KEY, pytest.fail) == written
    content = DAMAGES[damage]((folder / "index.json").read_text(encoding="utf-8"))
    (folder / "index.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    warnings: list[str] = []
    assert read_cache(folder, KEY, warnings.append) is None
    assert len(warnings) == 1 and f"{folder / 'index.json'} is damaged (" in warnings[0]
    with CacheWriter(folder, KEY, warn=pytest.fail) as writer:
        assert writer.numbers == set(range(12))
        writer.finish(written.skipped)
    assert read_cache(folder, KEY, pytest.fail) == written


def test_an_index_of_the_first_version_has_no_checksum(tmp_path: Path) -> None:
    written = write(tmp_path)
    document = json.loads((tmp_path / "index.json").read_text(encoding="utf-8"))
    del document["sha256"]
    (tmp_path / "index.json").write_text(json.dumps(document), encoding="utf-8")
    assert read_cache(tmp_path, KEY, pytest.fail) == written


def test_files_of_others_in_the_folder_stay(tmp_path: Path) -> None:
    claim_cache(tmp_path, KEY)
    names = ("shard-00000.safetensors", "shard-best.safetensors", "notes.txt")
    for name in names[:2]:
        save_file({"mine": torch.ones(3)}, tmp_path / name)
    (tmp_path / names[2]).write_text("mine", encoding="utf-8")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    warnings: list[str] = []
    with CacheWriter(tmp_path, KEY, warnings.append) as writer:
        writer.add(0, clip(0))
        cached = writer.finish({})
    assert [shard.name for shard in cached.shards] == ["shard-00001.safetensors"]
    assert [warning.endswith("it is left alone") for warning in warnings] == [True, True]
    assert {name: (tmp_path / name).read_bytes() for name in names} == before


@pytest.mark.usefixtures("small_shards")
def test_a_shard_of_another_cache_is_not_taken_up(tmp_path: Path) -> None:
    write(tmp_path / "other", replace(KEY, vae="cd" * 32))
    claim_cache(tmp_path / "cache", KEY)
    (tmp_path / "other/shard-00000.safetensors").rename(tmp_path / "cache/shard-00000.safetensors")
    (tmp_path / "cache/shard-00001.safetensors").write_bytes(b"noise")
    warnings: list[str] = []
    assert CacheWriter(tmp_path / "cache", KEY, warnings.append).numbers == set()
    assert len(warnings) == 2 and "damaged or of another cache" in warnings[0]


def test_what_a_run_may_take_from_a_cache() -> None:
    def wanting(**changes: object) -> list[str]:
        return cache_misfits(KEY, replace(KEY, cut=replace(KEY.cut, **changes)))  # type: ignore[arg-type]

    assert wanting() == []
    assert wanting(num_clips=3, exact=False) == []
    assert wanting(buckets=(Bucket(17, 64, 64), Bucket(5, 128, 512))) == []
    assert wanting(buckets=(Bucket(13, 128, 64),)) == ["clips of 17x64x96, 9x128xwhole, of which none covers 13x128x64"]
    assert wanting(buckets=(Bucket(9, None, None),)) != []
    assert wanting(num_clips=9) == ["8 clips instead of 9"]
    assert wanting(seed=1, max_side=64) == ["longest side None instead of 64", "seed 0 instead of 1"]


def test_what_differs_is_named(tmp_path: Path) -> None:
    write(tmp_path)
    changed = (FileStamp("/b.mp4", 201, 6), FileStamp("/c.mp4", 1, 1))
    with pytest.raises(MediaError) as caught:
        claim_cache(tmp_path, replace(KEY, vae="cd" * 32, files=changed, dtype="float16"))
    for text in (
        "caches other latents",
        "VAE (SHA-256) abababababab instead of cdcdcdcdcdcd",
        "number format float32 instead of float16",
        "1 data file not in it (/c.mp4)",
        "1 data file only in it (/a.mp4)",
        "1 data file changed since (/b.mp4)",
        "or another folder, or delete it",
    ):
        assert text in str(caught.value)


def test_folders_that_are_no_cache(tmp_path: Path) -> None:
    (tmp_path / "holiday.mp4").touch()
    with pytest.raises(MediaError, match=r"not empty \(holiday\.mp4\) and is not a latent cache"):
        claim_cache(tmp_path, KEY)
    for name, content in {"key.json": "{", "index.json": '{"key": 3}', "key2": "[]", "key3": '{"format": 99}'}.items():
        folder = tmp_path / name
        write(folder)
        (folder / ("index.json" if name == "index.json" else "key.json")).write_text(content)
        if name == "index.json":
            assert read_cache(folder, KEY, pytest.fail) is None  # of another key: written anew from the shards
        else:
            with pytest.raises(MediaError, match="cannot be read as part of a latent cache"):
                read_key(folder)


@pytest.mark.parametrize(
    "place",
    [
        *("vae", "latent_scale", "dtype", "cut.num_clips", "cut.seed", "cut.max_side", "cut.exact"),
        *("files.0.path", "files.1.num_bytes", "cut.buckets.0.num_frames", "cut.buckets.1.height"),
    ],
)
@pytest.mark.parametrize("value", [[1], {"a": 1}, 0.5])
@pytest.mark.unchecked
def test_a_key_with_a_value_of_another_type(tmp_path: Path, place: str, value: object) -> None:
    write(tmp_path)
    content = json.loads((tmp_path / "key.json").read_text())
    *path, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    holder = content
    for part in path:
        holder = holder[part]
    holder[last] = value
    (tmp_path / "key.json").write_text(json.dumps(content))
    with pytest.raises(MediaError, match=rf"cannot be read as part of a latent cache \({last} is "):
        claim_cache(tmp_path, KEY)


@pytest.mark.parametrize("field", ["num_bytes", "sha256", "clips", "skipped"])
@pytest.mark.unchecked
def test_an_index_with_a_value_of_another_type_is_made_anew(tmp_path: Path, field: str) -> None:
    """Of the first version, which has no checksum."""
    written = write(tmp_path)
    content = json.loads((tmp_path / "index.json").read_text())
    del content["sha256"]
    shard = content["shards"][0]
    if field == "skipped":
        content["skipped"] = {"/b.mp4": ["broken"]}
    else:
        shard[field] = {"0": [2, 5, "6"]} if field == "clips" else [shard[field]]
    (tmp_path / "index.json").write_text(json.dumps(content))
    warnings = list[str]()
    assert read_cache(tmp_path, KEY, warnings.append) is None
    assert len(warnings) == 1 and "it is rebuilt from the shards" in warnings[0]
    with CacheWriter(tmp_path, KEY, warn=pytest.fail) as writer:
        assert writer.finish({"/b.mp4": "broken"}) == written


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with (
        sole_writer(tmp_path),
        pytest.raises(MediaError, match="Another process is writing"),
        sole_writer(tmp_path),
    ):
        pytest.fail("two writers")
    with sole_writer(tmp_path):
        pass


def test_a_full_disk_keeps_finished_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_cache, "SHARD_CLIPS", 2)
    claim_cache(tmp_path, KEY)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def write_all() -> None:
        with CacheWriter(tmp_path, KEY, warn=pytest.fail) as writer:
            writer.add(0, clip(0))
            writer.add(1, clip(1))
            monkeypatch.setattr(latent_cache, "save_file", full)
            writer.add(2, clip(2))
            writer.add(3, clip(3))

    with pytest.raises(MediaError, match=r"No space left on device.*1 shards before it are kept"):
        write_all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.json", "shard-00000.safetensors"]


def test_a_cache_inside_the_data_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    write(tmp_path / "cache")
    assert find_clips([tmp_path]) == [tmp_path / "a.mp4"]


def test_stamps(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    assert stamp_file(path).num_bytes == -1
    path.write_bytes(b"123")
    first = stamp_file(path)
    assert first.num_bytes == 3 and Path(first.path).is_absolute()
    path.write_bytes(b"1234")
    assert stamp_file(path) != first
