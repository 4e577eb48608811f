from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flashvaed_cli.errors import MediaError
from flashvaed_cli.media.latent_files import is_latent_file, load_latents
from flashvaed_cli.media.sources import find_clips


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ["b.MP4", "a.webm", "sub/c.png", "sub/d.pth", ".hidden.mp4", ".git/e.mp4", "notes.md"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    save_file({"latents": torch.zeros(4, 1, 2, 2)}, tmp_path / "latents.safetensors")
    save_file({"w": torch.zeros(1)}, tmp_path / "vae.safetensors", metadata={"flashvaed": "{}"})
    return tmp_path


def test_folder_is_searched_in_order(folder: Path) -> None:
    expected = ["a.webm", "b.MP4", "latents.safetensors", "sub/c.png", "sub/d.pth"]
    assert [str(path.relative_to(folder)) for path in find_clips([folder])] == expected


def test_files_patterns_and_repeats(folder: Path) -> None:
    found = find_clips([folder / "b.MP4", str(folder / "*.webm"), folder / "**" / "*.png", folder / "b.MP4"])
    assert [path.name for path in found] == ["b.MP4", "a.webm", "c.png"]


def test_what_yields_nothing_is_named(folder: Path) -> None:
    (folder / "empty").mkdir()
    cases = {
        "nowhere.mp4": "nowhere.mp4 does not exist",
        "empty": "empty holds no clips. Accepted are videos",
        "*.avi": "matches no clip",
        "notes.md": "not of an accepted kind",
    }
    for name, message in cases.items():
        with pytest.raises(MediaError) as caught:
            find_clips([folder / "a.webm", folder / name])
        assert message in str(caught.value)
    with pytest.raises(MediaError, match="No data was given"):
        find_clips([])


def test_lists_name_files_folders_and_patterns(folder: Path) -> None:
    (folder / "list.txt").write_text(
        f"# mine\n\n  a.webm \nsub\n{folder}/*.MP4\nsub/c.png\ngone.mp4\n", encoding="utf-8"
    )
    names = [path.name for path in find_clips([folder / "list.txt", folder / "b.MP4"])]
    assert names == ["a.webm", "c.png", "d.pth", "b.MP4", "gone.mp4"]  # what is gone fails when it is read
    assert "list.txt" not in [path.name for path in find_clips([folder])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a.webm\nnotes.md\n", r"list\.txt, line 2: .*notes\.md is not of an accepted kind"),
        (b"*.avi", r"list\.txt, line 1: The pattern .* matches no clip"),
        (b"nowhere", r"list\.txt, line 1: .*nowhere does not exist"),
        (b"# nothing\n", r"list\.txt names no clip"),
        (b"\xff\xfe\x00", r"list\.txt cannot be read as a list"),
    ],
)
def test_bad_lists(folder: Path, content: bytes, message: str) -> None:
    (folder / "list.txt").write_bytes(content)
    with pytest.raises(MediaError, match=message):
        find_clips([folder / "list.txt"])


def test_latent_suffixes() -> None:
    assert [is_latent_file(name) for name in ("a.pth", "a.PT", "a.safetensors", "a.mp4")] == [True, True, True, False]


def test_arrays(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    latents = torch.randn(4, 3, 2, 5)
    np.save(path, latents.numpy())
    assert torch.equal(load_latents(path, latent_width=4), latents[None])
    np.save(path, np.array([{}]), allow_pickle=True)
    with pytest.raises(MediaError, match="cannot be read as a numpy array"):
        load_latents(path)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_latents_as_tensor_or_dict(tmp_path: Path, suffix: str) -> None:
    latents = torch.randn(1, 4, 3, 2, 5)
    path = tmp_path / f"a{suffix}"
    for content in (latents[0], latents, latents.bfloat16()):
        if suffix == ".safetensors":
            save_file({"latent": content.contiguous(), "other": torch.zeros(1)}, path)
        else:
            torch.save({"samples": content, "other": torch.zeros(1), "note": "x"} if suffix == ".pt" else content, path)
        loaded = load_latents(path, latent_width=4)
        assert loaded.dtype == torch.float32
        assert loaded.shape == latents.shape
        assert torch.equal(loaded, content.float().reshape(latents.shape))


def test_axes(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    latents = torch.randn(2, 3, 4, 5, 6)
    torch.save(latents, path)
    assert torch.equal(load_latents(path), latents)
    assert torch.equal(load_latents(path, latent_width=3), latents)
    assert torch.equal(load_latents(path, latent_width=4), latents.transpose(1, 2))
    with pytest.raises(MediaError, match="do not fit a decoder of 16 latent channels"):
        load_latents(path, latent_width=16)
    torch.save(torch.randn(2, 4, 4, 5, 6), path)  # both axes fit: channels come first
    assert load_latents(path, latent_width=4).shape == (2, 4, 4, 5, 6)
    torch.save(torch.randn(3, 4, 5, 6), path)  # frames or a batch? not guessed
    with pytest.raises(MediaError, match="can be 3 images or one clip"):
        load_latents(path, latent_width=4)


def test_unusable_latent_files_are_named(tmp_path: Path) -> None:
    contents: dict[str, object] = {
        "checkpoint.pth": {f"layer{index}": torch.zeros(1, 1, 1, 1, 1) for index in range(9)},
        "flat.pth": torch.zeros(3),
        "integer.pth": torch.zeros(1, 4, 1, 1, 1, dtype=torch.int64),
        "nan.pth": torch.full((4, 1, 1, 1), torch.nan),
        "none.pth": torch.zeros(4, 0, 1, 1),
        "text.pth": "hello",
        "path.pth": {"latents": Path("unpickled")},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "broken.safetensors").write_bytes(b"\x10" * 40)
    (tmp_path / "broken.pth").write_bytes(b"not a pickle")
    for name in [*contents, "broken.safetensors", "broken.pth", "nowhere.pth"]:
        with pytest.raises(MediaError, match=name):
            load_latents(tmp_path / name)


def test_real_latents(shared_dir: Path) -> None:
    path = shared_dir / "data" / "latents" / "wan21_test_latents_taehv.pth"
    if not path.is_file():
        pytest.skip(f"{path} is missing")
    assert load_latents(path, latent_width=16).shape == (1, 16, 16, 40, 64)
