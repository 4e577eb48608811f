from __future__ import annotations

import http.server
import json
import threading
from pathlib import Path

import pytest
import torch
from artifact_specs import DECODER_SPEC, small_decoder
from safetensors.torch import save_file

from flashvaed_cli.artifact.checkpoint import load_checkpoint
from flashvaed_cli.artifact.foreign.layouts import to_foreign
from flashvaed_cli.artifact.hub import HubAddress, fetch_hub_file, parse_hub_address
from flashvaed_cli.errors import ArtifactError
from flashvaed_cli.families.wan21.names import WAN_DIFFUSERS

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty snapshot of `some/repo` in a hand-made cache, with the network off."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--some--repo"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    folder = repo / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("hf://o/r/a/b.pth", ("o/r", "a/b.pth", None)),
        ("hf://o/r/a/b.pth@v1.0", ("o/r", "a/b.pth", "v1.0")),
        ("hf://o/r@v1.0/a/b.pth", ("o/r", "a/b.pth", "v1.0")),
        ("hf://o-1/r.2_x", ("o-1/r.2_x", "", None)),
        ("hf://o/r/", ("o/r", "", None)),
        ("hf://o/r@main", ("o/r", "", "main")),
        ("hf://o/r/vae@refs/pr/1", ("o/r", "vae", "refs/pr/1")),
    ],
)
def test_addresses(address: str, parts: tuple) -> None:
    assert parse_hub_address(address) == HubAddress(*parts)


@pytest.mark.parametrize(
    "address",
    [
        *("hf://", "hf://o", "hf:///r/x", "hf://o/r@a/x@b", "hf://o/r/../x.pth", "hf://o/r/x.pth@../../.."),
        *("hf://../r/x.pth", "hf://o/../x.pth", "hf://o/r@../x.pth", "hf://o/r/x.pth@/etc", "hf://o/r//etc/x.pth"),
        *("hf://o/r/a/./x.pth", "hf://o/r/x.pth@a/../../b", "hf://o/r/a\\..\\x.pth"),
    ],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ArtifactError, match="hf://OWNER/REPO/PATH"):
        parse_hub_address(address)


def test_a_file_in_the_cache(snapshot: Path) -> None:
    (snapshot / "a").mkdir()
    (snapshot / "a" / "b.pth").write_bytes(b"x")
    assert fetch_hub_file("hf://some/repo/a/b.pth").read_bytes() == b"x"
    assert fetch_hub_file(f"hf://some/repo/a/b.pth@{COMMIT}").read_bytes() == b"x"


def test_a_folder_in_the_cache_loads(snapshot: Path) -> None:
    decoder = small_decoder()
    (snapshot / "vae").mkdir()
    (snapshot / "vae" / "config.json").write_text("{}")
    tensors = to_foreign(decoder.state_dict(), DECODER_SPEC, WAN_DIFFUSERS)
    save_file(tensors, snapshot / "vae" / "diffusion_pytorch_model.safetensors")
    name = "stages.head.0.norm.gamma"
    for location in ("hf://some/repo/vae", "hf://some/repo"):
        checkpoint = load_checkpoint(location, builtins={})
        assert checkpoint.location == location
        assert torch.equal(checkpoint.require_decoder().state_dict()[name], decoder.state_dict()[name])
    with pytest.raises(ArtifactError, match="no folder other"):
        fetch_hub_file("hf://some/repo/other")


@pytest.mark.parametrize("path", ["absent.pth", "vae", "vae@v2"])
def test_without_network_the_way_out_is_said(snapshot: Path, path: str) -> None:
    with pytest.raises(ArtifactError, match=r"by hand and give the path.*HF_HOME"):
        fetch_hub_file(f"hf://other/repo/{path}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RepositoryNotFoundError", "no repository some/repo"),
        ("GatedRepoError", "accept its terms"),
        ("RevisionNotFoundError", "no revision v1"),
        ("EntryNotFoundError", r"has no x\.pth"),
        ("ConnectionError", "HF_HOME"),
    ],
)
def test_answers_of_the_hub(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, name, ConnectionError)
    error = kind.__new__(kind)

    def refuse(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(ArtifactError, match=message):
        fetch_hub_file("hf://some/repo/x.pth@v1")


@pytest.mark.parametrize("offline", [False, True])
def test_without_network_one_question_is_asked_and_nothing_else_said(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, offline: bool
) -> None:
    """huggingface_hub itself asks six times and tells of each."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")  # nobody listens there
    asked: list[float] = []
    monkeypatch.setattr("time.sleep", asked.append)
    (snapshot / "b.pth").write_bytes(b"x")
    assert fetch_hub_file("hf://some/repo/b.pth").read_bytes() == b"x"
    with pytest.raises(ArtifactError, match="HF_HOME"):
        fetch_hub_file("hf://some/repo/c.pth")
    assert (asked, caplog.records) == ([], [])


@pytest.mark.parametrize(("status", "message"), [(404, "no repository some/repo"), (403, "HF_HOME")])
def test_a_refusal_is_an_answer(monkeypatch: pytest.MonkeyPatch, status: int, message: str) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    kind = errors.RepositoryNotFoundError if status == 404 else errors.HfHubHTTPError
    error = kind.__new__(kind)

    def refuse(*_: object, **__: object) -> str:
        raise error

    def download(*_: object, local_files_only: bool, **__: object) -> str:
        assert not local_files_only
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(ArtifactError, match=message):
        fetch_hub_file("hf://some/repo/x.pth")


def test_a_name_that_cannot_be_a_repository() -> None:
    with pytest.raises(ArtifactError, match="not a valid repository name"):
        fetch_hub_file("hf://-some-/--repo/x.pth")


class _HostileHub(http.server.BaseHTTPRequestHandler):
    """A Hub that names its files so that they would be written elsewhere."""

    etag, commit, name = "", COMMIT, "x.pth"

    def do_GET(self) -> None:
        about = {"id": "some/repo", "sha": COMMIT, "private": False, "downloads": 0, "likes": 0, "tags": []}
        body = json.dumps({**about, "siblings": [{"rfilename": self.name}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{self.etag}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Length", "4")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("etag", "commit"),
    [("../../../escaped", COMMIT), ("/tmp/escaped", COMMIT), ("", COMMIT), ("a" * 64, "../../escaped")],
)
def test_names_that_leave_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, etag: str, commit: str) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    if huggingface_hub.__version__.startswith("0."):
        pytest.skip("releases before 1.0 read the Hub's address when they are imported")

    monkeypatch.setattr(_HostileHub, "etag", etag)
    monkeypatch.setattr(_HostileHub, "commit", commit)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _HostileHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    try:
        with pytest.raises(ArtifactError, match="cannot name a file of the cache"):
            fetch_hub_file("hf://some/repo/x.pth")
    finally:
        server.shutdown()
        server.server_close()
    assert list(tmp_path.rglob("*escaped*")) == []


def test_an_address_in_a_file_is_looked_up_in_the_cache_only(snapshot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    def ask(*_: object, **__: object) -> None:
        pytest.fail("asked the network")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", ask)
    (snapshot / "b.pth").write_bytes(b"x")
    assert fetch_hub_file("hf://some/repo/b.pth", only_cached=True).read_bytes() == b"x"
    for path in ("c.pth", "vae@v9"):
        with pytest.raises(ArtifactError, match="--allow-download"):
            fetch_hub_file(f"hf://some/repo/{path}", only_cached=True)
