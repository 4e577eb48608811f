"""What a faster decoder means for a whole pipeline, whose other steps (text encoder, denoising) take as ever."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PipelineShare:
    """A pipeline with one decoder beside the same pipeline with the eager original.

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
        """Of the pipeline's time, how much is decoding."""
        return 100 * self.decode_s / self.total_s

    @property
    def speedup(self) -> float:
        """How many times as fast as with the eager original the pipeline is: Amdahl's law."""
        return (self.rest_s + self.original_s) / self.total_s

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {
            "rest_s": self.rest_s,
            "total_s": self.total_s,
            "decoding_percent": self.decoding_percent,
            "speedup": self.speedup,
        }
