"""`report.html` in a real browser: nothing wider than the window, the slider moves, no script fails."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.commands import JUDGING, succeed
from tests.toy import write_toy_clip

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")

# The page in a frame of the width to test: Chromium's own window is never narrower than 500 pixels.
_FRAME = """<!doctype html><iframe id="page" style="width:{width}px;height:2000px;border:0"></iframe><script>
addEventListener("message", (event) => document.title = event.data);
document.getElementById("page").srcdoc = atob("{page}");
</script>"""
_PROBE = """<script>
const failures = [];
addEventListener("error", (event) => failures.push(event.message));
addEventListener("load", () => {
  const slider = document.querySelector("[data-control=slider]");
  const frame = document.querySelector("[data-control=frame]");
  slider.value = 20; slider.dispatchEvent(new Event("input"));
  const before = document.querySelector(".compare img.over").src;
  frame.value = 0; frame.dispatchEvent(new Event("input"));
  parent.postMessage([document.documentElement.scrollWidth, document.querySelector(".compare").style.cssText,
    before !== document.querySelector(".compare img.over").src, failures.length].join("|"), "*");
});
</script>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    write_toy_clip(folder / "clip.mp4", 9, 48, 64)
    succeed("convert-ops --profile exact -o exact.safetensors", cwd=folder)
    succeed(f"eval exact.safetensors --data clip.mp4 {JUDGING}", cwd=folder)
    return (folder / "report" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_works(page: str, width: int, tmp_path: Path) -> None:
    import base64

    probed = page.replace("<head>", f"<head>{_PROBE}", 1).encode("ascii", "xmlcharrefreplace")
    (tmp_path / "frame.html").write_text(
        _FRAME.format(width=width, page=base64.b64encode(probed).decode()), encoding="utf-8"
    )
    assert BROWSER is not None
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
        [*command, f"--window-size={width + 40},2100", f"--user-data-dir={tmp_path / 'profile'}",
         (tmp_path / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stdout[:500]
    scroll_width, style, changed, failures = title.group(1).split("|")
    assert int(scroll_width) <= width
    assert "--at: 20%" in style
    assert (changed, failures) == ("true", "0")
