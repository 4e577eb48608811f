"""Latents that are remembered between commands."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashvaed_cli.media.encoded_clips import EncodedClips
from flashvaed_cli.media.sources import find_clips
from flashvaed_cli.paths import cache_folder

LATENTS = torch.randn(1, 4, 2, 3, 3)
FACTS = {"vae": "a", "cut": {"start": 0, "crop": [1, 2]}}


def test_what_was_stored_is_found(tmp_path: Path) -> None:
    clips = EncodedClips(tmp_path / "latents")
    assert clips.find(FACTS) is None and not (tmp_path / "latents").exists()
    clips.store(FACTS, LATENTS)
    found = EncodedClips(tmp_path / "latents").find({"cut": {"crop": [1, 2], "start": 0}, "vae": "a"})
    assert found is not None and torch.equal(found, LATENTS)


@pytest.mark.parametrize("other", [{**FACTS, "vae": "b"}, {"vae": "a"}, {**FACTS, "cut": {"start": 1, "crop": [1, 2]}}])
def test_other_facts_find_nothing(other: dict[str, object], tmp_path: Path) -> None:
    clips = EncodedClips(tmp_path)
    clips.store(FACTS, LATENTS)
    assert clips.find(other) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 100,
        {"latents": LATENTS.half()},
        {"latents": LATENTS[0]},
        {"latents": LATENTS * torch.nan},
        {"x": LATENTS},
    ],
)
def test_damaged_files_are_encoded_again(content: bytes | dict[str, torch.Tensor], tmp_path: Path) -> None:
    clips = EncodedClips(tmp_path)
    clips.store(FACTS, LATENTS)
    (path,) = tmp_path.glob("*.safetensors")
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file(content, path)
    assert clips.find(FACTS) is None
    clips.store(FACTS, LATENTS)
    assert clips.find(FACTS) is not None


@pytest.mark.parametrize("change", ["bit", "shape", "another clip's", "pipe", "folder"])
def test_what_was_put_in_place_of_a_clip_is_not_used(change: str, tmp_path: Path) -> None:
    clips = EncodedClips(tmp_path)
    clips.store(FACTS, LATENTS)
    (path,) = tmp_path.glob("*.safetensors")
    if change == "bit":
        content = bytearray(path.read_bytes())
        content[-40] ^= 1
        path.write_bytes(content)
    elif change == "shape":
        save_file({**load_file(path), "latents": torch.zeros(1, 9, 0, 3, 3)}, path)
    elif change == "another clip's":
        clips.store({"vae": "b"}, LATENTS + 1)
        (other,) = set(tmp_path.glob("*.safetensors")) - {path}
        shutil.copy(other, path)
    else:
        path.unlink()
        os.mkfifo(path) if change == "pipe" else path.mkdir()
    assert clips.find(FACTS) is None


def test_what_an_encoder_gives_is_found_as_it_is(tmp_path: Path) -> None:
    clips = EncodedClips(tmp_path)
    clips.store(FACTS, LATENTS * torch.nan)
    found = clips.find(FACTS)
    assert found is not None and found.isnan().all()


def test_files_of_the_user_stay(tmp_path: Path) -> None:
    """Where FLASHVAED_CACHE names a folder of data that has a folder `latents`."""
    (tmp_path / "mine.safetensors").write_bytes(bytes(1000))
    clips = EncodedClips(tmp_path, max_bytes=10)
    clips.store(FACTS, LATENTS)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.safetensors"]


def test_remembered_clips_are_no_data(tmp_path: Path) -> None:
    """In a cache below a folder of data; the second run would calibrate on other clips than the first."""
    save_file({"latents": LATENTS}, tmp_path / "data.safetensors")
    EncodedClips(tmp_path / "cache").store(FACTS, LATENTS)
    assert find_clips([tmp_path]) == [tmp_path / "data.safetensors"]


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000])
def test_a_folder_whose_name_is_too_long_is_no_error(name: str, tmp_path: Path) -> None:
    clips = EncodedClips(tmp_path / name)
    clips.store(FACTS, LATENTS)
    assert clips.find(FACTS) is None


def test_the_folder_keeps_to_its_size(tmp_path: Path) -> None:
    """What was used longest ago goes first, and the last one stays only if it fits."""
    size = LATENTS.numel() * 4 + 32
    clips = EncodedClips(tmp_path, max_bytes=3 * (size + 300))
    for number in range(3):
        clips.store({"number": number}, LATENTS)
        for age, path in enumerate(sorted(tmp_path.glob("*.safetensors"), key=lambda one: -one.stat().st_mtime)):
            os.utime(path, (1000 - age, 1000 - age))
    assert clips.find({"number": 0}) is not None  # used just now
    clips.store({"number": 3}, LATENTS)
    assert [clips.find({"number": number}) is not None for number in range(4)] == [True, False, True, True]
    small = EncodedClips(tmp_path, max_bytes=10)
    small.store({"number": 4}, LATENTS)
    assert not list(tmp_path.iterdir())


def test_nothing_is_remembered_without_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHVAED_CACHE", "off")
    clips = EncodedClips.of_user()
    clips.store(FACTS, LATENTS)
    assert clips.folder is None and clips.find(FACTS) is None


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FLASHVAED_CACHE", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "flashvaed"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/flashvaed")
    monkeypatch.setenv("FLASHVAED_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"
