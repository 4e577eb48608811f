from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flashvaed_cli.errors import MediaError
from flashvaed_cli.media.latent_files import is_always_raw, load_latents


def test_a_comfyui_latent_has_its_scale(tmp_path: Path) -> None:
    latents = torch.randn(1, 4, 3, 2, 5)
    path = tmp_path / "x.latent"
    save_file({"latent_tensor": latents, "latent_format_version_0": torch.tensor([])}, path)
    assert torch.equal(load_latents(path, latent_width=4), latents)
    save_file({"latent_tensor": latents * 0.18215}, path)  # as files were before they had a version
    assert torch.allclose(load_latents(path, latent_width=4), latents)
    assert is_always_raw(path)
    assert not is_always_raw("x.safetensors")


@pytest.mark.parametrize(("value", "found"), [(1e20, r"up to 1e\+20"), (-3e38, r"up to 3e\+38"), (torch.nan, "NaN")])
def test_latents_that_would_decode_to_a_flat_picture_are_refused(tmp_path: Path, value: float, found: str) -> None:
    latents = torch.randn(1, 4, 3, 2, 5)
    latents[0, 1, 1, 1, 1] = value
    save_file({"latents": latents}, tmp_path / "x.safetensors")
    with pytest.raises(MediaError, match=f"x.safetensors: the latents hold .*{found}"):
        load_latents(tmp_path / "x.safetensors", latent_width=4)


def test_a_list_of_clips_is_a_batch(tmp_path: Path) -> None:
    clips = [torch.randn(4, 3, 2, 5) for _ in range(2)]
    torch.save(clips, tmp_path / "wan.pt")
    assert torch.equal(load_latents(tmp_path / "wan.pt", latent_width=4), torch.stack(clips))
    torch.save([clips[0], clips[1][:, :2]], tmp_path / "wan.pt")
    with pytest.raises(MediaError, match=r"of one size\. Save clips of different sizes in separate files"):
        load_latents(tmp_path / "wan.pt", latent_width=4)


@pytest.mark.parametrize("count", [3, 4])
def test_images_without_a_time_axis_are_not_taken_for_a_clip(tmp_path: Path, count: int) -> None:
    path = tmp_path / "a.pt"
    torch.save(torch.randn(count, 4, 8, 6), path)
    with pytest.raises(MediaError, match=rf"can be {count} images or one clip\. .*\[{count}, 4, 1, 8, 6\]"):
        load_latents(path, latent_width=4)
    torch.save(torch.randn(1, 4, 8, 6), path)
    assert load_latents(path, latent_width=4).shape == (1, 4, 1, 8, 6)
    torch.save(torch.randn(1, 4, 4, 8, 6), path)  # a clip of four latent frames, whatever the width
    assert load_latents(path, latent_width=4).shape == (1, 4, 4, 8, 6)


def test_files_that_promise_more_than_they_hold_are_refused(tmp_path: Path) -> None:
    torch.save(torch.zeros(1).expand(1, 16, 1000, 1000, 1000), tmp_path / "expanded.pt")
    torch.save(torch.zeros(16, 9, 40, 40).to_sparse(), tmp_path / "sparse.pt")
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (16, 1000000, 1000, 1000), }"
    for name, text in {
        "huge.npy": header,
        "negative.npy": header.replace(b"16,", b"-1,"),
        "nested.npy": b"(" * 900,
        "object.npy": header.replace(b"<f4", b"|O"),
        "text.npy": b"hello",
    }.items():
        (tmp_path / name).write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text)
    (tmp_path / "short.npy").write_bytes(b"\x93NU")
    (tmp_path / "null.safetensors").write_bytes(struct.pack("<Q", 21) + b'{"__metadata__": null}'[:21])
    os.mkfifo(tmp_path / "pipe.npy")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(MediaError, match=path.name):
            load_latents(path, latent_width=16)


def test_a_fortran_array_is_read(tmp_path: Path) -> None:
    latents = np.asfortranarray(np.random.default_rng(0).normal(size=(4, 3, 2, 5)).astype(np.float32))
    np.save(tmp_path / "a.npy", latents)
    assert torch.equal(load_latents(tmp_path / "a.npy", latent_width=4)[0], torch.from_numpy(latents))
