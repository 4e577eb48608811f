from __future__ import annotations

from pathlib import Path

import pytest

from flashvaed_cli.errors import MediaError
from flashvaed_cli.media import sources


def test_folders_and_patterns_that_span_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / "a" / "b"
    deep.mkdir(parents=True)
    for number in range(30):
        (deep / f"{number}.txt").touch()
    (tmp_path / "clip.mp4").touch()
    monkeypatch.setattr(sources, "MAX_FILES_SEARCHED", 20)
    for searched in (tmp_path, tmp_path / "**" / "*.mp4", tmp_path / "*" / "*" / "*.mp4"):
        with pytest.raises(MediaError, match="spans more than 20 files"):
            sources.find_clips([searched])
    # A pattern of one level looks at that level only.
    assert sources.find_clips([tmp_path / "*.mp4"]) == [tmp_path / "clip.mp4"]
    # A file whose name looks like a pattern is a file.
    (tmp_path / "clip [1].mp4").touch()
    assert sources.find_clips([tmp_path / "clip [1].mp4"]) == [tmp_path / "clip [1].mp4"]
