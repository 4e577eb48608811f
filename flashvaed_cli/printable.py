"""Make text from files safe for a terminal: it cannot move the cursor, change the title or hide what follows."""

from __future__ import annotations

import re

# C0 and C1 controls except tab and newline, direction marks, and lone surrogates (names that are not UTF-8).
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, longest: int | None = None) -> str:
    r"""The text with control characters written out (`\x1b`), cut in the middle if longer than `longest`."""
    text = _UNPRINTABLE.sub(lambda match: _written_out(match.group()), text)
    if longest is None or len(text) <= longest:
        return text
    half = (longest - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def printable_line(text: str, longest: int | None = None) -> str:
    r"""`printable` for what must stay on one line, such as a file name: line breaks and tabs are written out too."""
    text = text.replace("\n", "\\n").replace("\t", "\\t")
    return printable(text, longest)


def counted(number: int, noun: str) -> str:
    """A number with its noun, as `1 frame` or `2 frames`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def printable_message(text: str, longest: int | None = None) -> str:
    """`printable` for a message; lines after the first are indented, so that none can pose as another message."""
    return printable(text, longest).replace("\n", "\n  ")


def _written_out(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00  # a byte of a name that is not UTF-8
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
