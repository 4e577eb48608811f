"""What a faster decoder means for a whole pipeline, whose other steps (text encoder, denoising) stay the same."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PipelineShare:
    """A pipeline with one decoder, compared with the same pipeline with the eager original.

    Attributes:
        rest_s: seconds of everything but decoding.
        decode_s, original_s: seconds of decoding the clip, by this decoder and by the eager original.
    """

    rest_s: float
    decode_s: float
    original_s: float

    @property
    def total_s(self) -> float:
        """Seconds from prompt to frames."""
        return self.rest_s + self.decode_s

    @property
    def decoding_percent(self) -> float:
        """Decoding's share of the pipeline's time."""
        return 100 * self.decode_s / self.total_s

    @property
    def speedup(self) -> float:
        """The pipeline's speed-up over the one with the eager original: Amdahl's law."""
        return (self.rest_s + self.original_s) / self.total_s

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {
            "rest_s": self.rest_s,
            "total_s": self.total_s,
            "decoding_percent": self.decoding_percent,
            "speedup": self.speedup,
        }
