"""Which files flashvaed wrote: only those are replaced without `--force`, and none of them is used as data.

The mark is inside the file, so it survives when the file is moved. Imports no torch.
"""

from __future__ import annotations

import json
from pathlib import Path

from flashvaed_cli.errors import FlashVaedError
from flashvaed_cli.untrusted.demuxers import VIDEO_OPTIONS
from flashvaed_cli.untrusted.safetensors_file import read_index

SOFTWARE = "flashvaed"
"""The mark: `Software` of a PNG, `comment` of a video, `kind` of a JSON document begins with it."""

HEADER_KEY = "flashvaed"
"""The key of an artifact's own header in the metadata of a safetensors file."""

REMEMBERED_KEY = "flashvaed_remembered"
"""The key, in that metadata, of what is remembered between commands: a user may keep it in a folder of data."""

_JUNIT_MARK = b'<testsuite name="flashvaed eval"'
_XML_START = 512
_MAX_JSON_BYTES = 64_000_000
_VIDEO_SUFFIXES = (".mp4",)
# A manifest of flashvaed 0.3 and earlier has no kind.
_OLD_MANIFEST = {"command", "decoder", "sha256", "files"}


def is_own_file(path: Path) -> bool:
    """Whether flashvaed wrote a file: an artifact, a report and its pictures or videos, a log, a remembered clip."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".safetensors":
            return bool({HEADER_KEY, REMEMBERED_KEY} & _metadata_keys(path))
        if suffix == ".png":
            return _png_software(path) == SOFTWARE
        if suffix in _VIDEO_SUFFIXES:
            return _video_comment(path).startswith(SOFTWARE)
        if suffix == ".json":
            return _is_own_document(path)
        if suffix == ".xml":
            with path.open("rb") as file:
                return _JUNIT_MARK in file.read(_XML_START)
        if suffix == ".jsonl":
            with path.open("rb") as file:
                return isinstance(first := json.loads(file.readline(4096)), dict) and "run_key" in first
    except (OSError, ValueError, RecursionError):
        pass
    return False


def has_own_header(path: Path) -> bool:
    """Whether the header of a safetensors file carries our key."""
    return HEADER_KEY in _metadata_keys(path)


def _metadata_keys(path: Path) -> set[str]:
    try:
        return set(read_index(path).metadata)
    except (OSError, FlashVaedError):
        return set()


def _is_own_document(path: Path) -> bool:
    if path.stat().st_size > _MAX_JSON_BYTES:
        return False
    document = json.loads(path.read_bytes())
    if not isinstance(document, dict):
        return False
    return str(document.get("kind", "")).startswith(SOFTWARE) or document.keys() >= _OLD_MANIFEST


def _png_software(path: Path) -> object:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.info.get("Software")


def _video_comment(path: Path) -> str:
    import av
    import av.error

    try:
        with av.open(f"file:{path}", options=VIDEO_OPTIONS, metadata_errors="replace") as container:
            return container.metadata.get("comment", "")
    except av.error.FFmpegError:
        return ""
