"""What a file without readable weights is, so that the mistake can be named."""

from __future__ import annotations

from pathlib import Path

_HEAD_BYTES = 512

# Offset in the file, the bytes there, and what the file is.
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (4, b"ftyp", "a video (MP4)"),
    (0, b"\x1a\x45\xdf\xa3", "a video (Matroska or WebM)"),
    (8, b"AVI ", "a video (AVI)"),
    (0, b"\x89PNG", "a picture (PNG)"),
    (0, b"\xff\xd8\xff", "a picture (JPEG)"),
    (0, b"GGUF", "a GGUF file"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"<", "a web page"),
)
_TEXTS = {".json": "a JSON file", ".yaml": "a YAML file", ".yml": "a YAML file", ".md": "a text", ".txt": "a text"}


def kind_of_file(path: Path) -> str | None:
    """What a file is, by its first bytes or else its suffix; None if they do not tell.

    An empty file tells nothing, whatever its suffix: its writing was cut short.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head:
        return None
    if found := next((what for start, magic, what in _MAGIC if head[start:].startswith(magic)), None):
        return found
    if path.suffix.lower() == ".onnx":
        return "an ONNX graph, which is made from a decoder (flashvaed export), not the other way round"
    return _TEXTS.get(path.suffix.lower())
