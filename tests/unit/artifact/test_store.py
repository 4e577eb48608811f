from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from artifact_specs import header
from safetensors.torch import save_file

from flashvaed_cli.artifact.store import read_artifact, read_header, sha256_of, sha256_of_files, write_artifact
from flashvaed_cli.errors import ArtifactError

TENSORS = {
    "decoder.b": torch.arange(6.0).reshape(2, 3),
    "decoder.a": torch.ones(3, dtype=torch.bfloat16),
    "gram": torch.eye(2, dtype=torch.float64),
    "empty": torch.zeros(0),
}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "new folder" / "x.safetensors"
    write_artifact(path, TENSORS, header(seed=3))
    return path


def test_round_trip(written: Path) -> None:
    found, tensors = read_artifact(written)
    assert found == header(seed=3) == read_header(written)
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_views_and_shared_memory_are_written_whole(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"base": base, "transposed": base.t(), "row": base[1], "again": base}
    write_artifact(tmp_path / "x.safetensors", tensors, header())
    _, found = read_artifact(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)


def test_equal_content_gives_equal_bytes(written: Path) -> None:
    other = written.with_name("y.safetensors")
    write_artifact(other, dict(reversed(TENSORS.items())), header(seed=3))
    assert sha256_of(other) == sha256_of(written)
    write_artifact(other, TENSORS, header(seed=4))
    assert sha256_of(other) != sha256_of(written)


def test_own_files_are_replaced_and_others_are_not(written: Path) -> None:
    write_artifact(written, {}, header(seed=5))
    assert read_header(written).seed == 5
    for foreign in (b"precious", b""):
        other = written.with_name("other.safetensors")
        other.write_bytes(foreign)
        with pytest.raises(ArtifactError, match=r"not written by flashvaed.*--force"):
            write_artifact(other, {}, header())
        assert other.read_bytes() == foreign
    save_file({"w": torch.ones(1)}, other, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="--force"):
        write_artifact(other, {}, header())
    write_artifact(other, {}, header(seed=6), force=True)
    assert read_header(other).seed == 6
    with pytest.raises(ArtifactError, match="is a folder"):
        write_artifact(written.parent, {}, header(), force=True)


def test_a_truncated_artifact_may_be_replaced(written: Path) -> None:
    written.write_bytes(written.read_bytes()[:-4])
    write_artifact(written, TENSORS, header(seed=8))
    assert read_header(written).seed == 8


def test_every_truncation_is_an_error(written: Path) -> None:
    whole = written.read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        written.write_bytes(whole[:length])
        for read in (read_header, read_artifact):
            with pytest.raises(ArtifactError, match="truncated"):
                read(written)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\x89PNG" + b"\0" * 99, r"a picture \(PNG\), "),
        (b"\0\0\0 ftypisom" + b"\0" * 99, r"a video \(MP4\), "),
        (b"[1]" * 40, ""),
        (b"\x02\0\0\0\0\0\0\0[]", ""),
        (b"\xff" * 64, ""),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"x\.safetensors: {kind}not a safetensors file"):
        read_artifact(path)


def test_safetensors_without_header_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match="without a flashvaed header"):
        read_artifact(tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match="no such file"):
        read_artifact(tmp_path / "y.safetensors")


def test_no_space_leaves_the_old_file(written: Path) -> None:
    before = written.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(ArtifactError, match=r"cannot write .*x\.safetensors \(4\.0 MB\)"):
            write_artifact(written, {"big": torch.zeros(1_000_000)}, header())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert written.read_bytes() == before
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="cannot write"):
        write_artifact(tmp_path / "file" / "x.safetensors", {}, header())


def test_sha256_of_several_files_does_not_depend_on_order(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    for file in files:
        file.write_text(file.name)
    assert sha256_of_files(files) == sha256_of_files(files[::-1])
    assert sha256_of_files(files[:1]) == sha256_of(files[0])


KILLED_WRITER = """
import os, random, signal, sys, time
import torch
from artifact_specs import header
from flashvaed_cli.artifact.store import read_artifact, write_artifact

torch.set_num_threads(1)
path = sys.argv[1]


def write(seed):
    write_artifact(path, {"w": torch.full((100_000,), float(seed))}, header(seed=seed))


write(0)
random.seed(1)
seen = set()
for turn in range(1, 16):
    before = os.stat(path).st_ino
    child = os.fork()
    if child == 0:
        for seed in range(1000 * turn, 1000 * turn + 1000):
            write(seed)
    while os.stat(path).st_ino == before:
        time.sleep(0.001)
    time.sleep(random.uniform(0.0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found, tensors = read_artifact(path)
    assert torch.equal(tensors["w"], torch.full((100_000,), float(found.seed)))
    seen.add(found.seed // 1000)
print(len(seen))
"""


def test_sigkill_leaves_the_old_file_or_the_new(tmp_path: Path, repository: Path) -> None:
    """Fifteen writers, each killed at a random moment of its loop; every time the file is one of those written."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED_WRITER, str(tmp_path / "x.safetensors")],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{repository}:{Path(__file__).parent}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 15
