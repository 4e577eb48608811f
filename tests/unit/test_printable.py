from __future__ import annotations

import os

from flashvaed_cli.printable import printable, printable_line, printable_message


def test_control_characters_are_written_out() -> None:
    assert printable("a\x1b]0;title\x07b\x9bc\r\u202ed\ttab\nline é 漢 🎬") == (
        "a\\x1b]0;title\\x07b\\x9bc\\x0d\\u202ed\ttab\nline é 漢 🎬"
    )


def test_names_that_are_not_utf8_can_be_printed() -> None:
    assert printable(os.fsdecode(b"caf\xe9.mp4")) == "caf\\xe9.mp4"


def test_long_texts_are_cut_in_the_middle() -> None:
    cut = printable("a" * 5000 + "b" * 5000, longest=2000)
    assert len(cut) <= 2000 and cut.startswith("aaa") and cut.endswith("bbb") and " ... " in cut


def test_a_name_cannot_begin_a_line_of_its_own() -> None:
    name = "a.mp4\nwrote flash.safetensors\r\tb"
    assert printable_line(name) == "a.mp4\\nwrote flash.safetensors\\x0d\\tb"
    assert printable_message(f"{name} is left out") == "a.mp4\n  wrote flash.safetensors\\x0d\tb is left out"
