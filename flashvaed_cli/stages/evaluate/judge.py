"""Every decoder's frames against the video and against the original's, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.distill.ranks import Ranks
from flashvaed_cli.errors import MetricUnavailableError
from flashvaed_cli.media.pixels import to_pixels
from flashvaed_cli.metrics.frechet import FeatureExtractor, FeatureStatistics, frechet_distance, needs_more_samples
from flashvaed_cli.metrics.lpips_metric import LpipsMetric
from flashvaed_cli.metrics.quality import QualityAccumulator, QualityResult
from flashvaed_cli.metrics.vmaf import MIN_SIDE, VmafStream
from flashvaed_cli.report.evaluation import FrechetDistances

Frames = Float[Tensor, "3 T H W"]


@dataclass(frozen=True)
class Metrics:
    """The optional measures.

    Attributes:
        lpips: None leaves it out.
        ffmpeg: one with libvmaf; None leaves VMAF out.
        needs_vmaf: the evaluation fails if ffmpeg fails on a clip.
        features: of the Fréchet distances, over all clips together; None leaves them out.
    """

    lpips: LpipsMetric | None = None
    ffmpeg: str | None = None
    needs_vmaf: bool = False
    features: FeatureExtractor | None = None


class ClipJudge:
    """Quality of one decoder on one clip, against the video and against the original's output."""

    def __init__(
        self, metrics: Metrics, frames_per_latent: int, until_the_end: ExitStack, warn: Callable[[str], None]
    ) -> None:
        """Start empty.

        Args:
            until_the_end: closes the helper processes.
            warn: called with a message when a metric fails and is left out for this clip.
        """
        self._metrics, self._until_the_end, self._warn = metrics, until_the_end, warn
        lpips = metrics.lpips
        self._accumulators = {
            reference: QualityAccumulator(
                lpips=lpips,
                lpips_min_side=0 if lpips is None else lpips.min_side,
                thorough=True,
                frames_per_latent=frames_per_latent,
            )
            for reference in ("video", "original")
        }
        self._vmaf: dict[str, VmafStream | None] = {}  # None: it failed
        self._has: set[str] = set()

    def update(self, frames: Frames, video: Frames | None, original: Frames) -> None:
        """Add the next frames of the decoder, of the video if there is one, and of the original."""
        if video is not None:
            self._compare("video", frames, video)
        if frames is not original:
            self._compare("original", frames, original)

    def to_video(self) -> QualityResult | None:
        """Quality against the video; None if there is none."""
        return self._result("video")

    def to_original(self) -> QualityResult | None:
        """Quality against the original's output; None for the original itself."""
        return self._result("original")

    def _compare(self, reference: str, frames: Frames, wanted: Frames) -> None:
        self._has.add(reference)
        self._accumulators[reference].update(frames, wanted)
        with self._vmaf_may_fail(reference):
            self._add_vmaf(reference, frames, wanted)

    def _add_vmaf(self, reference: str, frames: Frames, wanted: Frames) -> None:
        height, width = frames.shape[-2:]
        if self._metrics.ffmpeg is None or min(height, width) < MIN_SIDE:
            return
        if reference not in self._vmaf:
            stream = VmafStream(self._metrics.ffmpeg, height, width)
            self._vmaf[reference] = self._until_the_end.enter_context(stream)
        if (stream := self._vmaf[reference]) is not None:
            stream.update(to_pixels(frames, 0), to_pixels(wanted, 0))

    @contextmanager
    def _vmaf_may_fail(self, reference: str) -> Iterator[None]:
        """Leave VMAF out for this clip if it fails, unless the user asked for it by name."""
        try:
            yield
        except MetricUnavailableError as error:
            if self._metrics.needs_vmaf:
                raise
            self._vmaf[reference] = None
            self._warn(f"{error}; it is left out for this clip")

    def _result(self, reference: str) -> QualityResult | None:
        if reference not in self._has:
            return None
        result = self._accumulators[reference].result()
        with self._vmaf_may_fail(reference):
            if (stream := self._vmaf.get(reference)) is not None:
                result = replace(result, vmaf=stream.result())
        return result


class FeatureJudge:
    """The features of every view (the video, the original, the students) over all clips."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        self._extractor = extractor
        self.statistics: dict[str, FeatureStatistics] = {}
        self._waiting: dict[str, Tensor] = {}

    def update(self, views: Mapping[str, Frames]) -> None:
        """Add the next frames of a clip."""
        step = self._extractor.num_frames if self._extractor.takes == "clip" else 1
        for name, frames in views.items():
            waiting = torch.cat([self._waiting[name], frames], dim=1) if name in self._waiting else frames
            for window in waiting[:, : waiting.shape[1] // step * step].split(step, dim=1):
                features = self._extractor(window)
                statistics = self.statistics.setdefault(name, FeatureStatistics(features.shape[1]))
                statistics.add(features)
            self._waiting[name] = waiting[:, waiting.shape[1] // step * step :].clone()

    def end_clip(self) -> None:
        """End a clip, dropping the last frames if they do not fill a window."""
        self._waiting.clear()

    def share(self, name: str, ranks: Ranks) -> None:
        """Add up a view's features over all processes; every process must call it, even without a clip."""
        if ranks.count == 1:
            return
        found = [one for one in ranks.gather(self.statistics.get(name)) if one is not None]
        if found:
            self.statistics[name] = FeatureStatistics.added_up(found)

    def distances(self, name: str, *, video: str, original: str) -> FrechetDistances | None:
        """The Fréchet distances of a view; None if it has fewer than two samples."""
        own = self.statistics.get(name)
        if own is None or own.count < 2:
            return None
        to_video = self.statistics.get(video)
        return FrechetDistances(
            to_ground_truth=None if to_video is None else frechet_distance(own, to_video),
            to_original=None if name == original else frechet_distance(own, self.statistics[original]),
            num_samples=int(own.count),
            num_features=len(own.total),
        )

    def warning(self) -> str | None:
        """A warning if there are too few samples; None otherwise."""
        if not self.statistics:
            return f"no clip has {self._extractor.num_frames} frames: there is no Fréchet distance"
        one = next(iter(self.statistics.values()))
        return needs_more_samples(int(one.count), len(one.total))
