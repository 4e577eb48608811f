from __future__ import annotations

from flashvaed_cli.media.video import probe_video
from flashvaed_cli.zoo.builtin import FITTING_CLIPS, JUDGED_CLIP


def test_shipped_clips_are_small_and_of_a_video_each() -> None:
    assert JUDGED_CLIP not in FITTING_CLIPS
    sizes = {path.stem: probe_video(path) for path in (*FITTING_CLIPS, JUDGED_CLIP)}
    assert {(info.num_frames, info.height, info.width) for name, info in sizes.items() if name != "bird"} == {
        (33, 256, 256)
    }
    assert (sizes["bird"].num_frames, sizes["bird"].height, sizes["bird"].width) == (65, 216, 384)
    assert sum(path.stat().st_size for path in (*FITTING_CLIPS, JUDGED_CLIP)) < 300_000


def test_every_shipped_clip_is_attributed() -> None:
    attribution = (JUDGED_CLIP.parent / "ATTRIBUTION.md").read_text()
    for path in (*FITTING_CLIPS, JUDGED_CLIP):
        assert f"`{path.name}`" in attribution
