"""Conditions on the figures of a report, for CI: `psnr_retention>=0.969`, `video.ssim>0.9`, `mild:speedup>=2`."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flashvaed_cli.errors import RecipeError
from flashvaed_cli.report.evaluation import (
    DecoderFigures,
    EvaluationReport,
    GateVerdict,
    figure_of,
    retention_percent,
)
from flashvaed_cli.report.figures import FIGURES, RETENTION, short_name

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_CONDITION = re.compile(
    r"(?:(?P<decoder>[^:<>=]+):)?(?P<figure>[a-z0-9_.]+)\s*(?P<operator>>=|<=|>|<)\s*(?P<bound>[-+0-9.eE]+)"
)
_OF_DECODERS: dict[str, Callable[[DecoderFigures], float | None]] = {
    "speedup": lambda one: one.speedup and one.speedup.median,
    "speedup_min": lambda one: one.speedup and one.speedup.min,
    "frames_per_second": lambda one: one.frames_per_second,
    "num_parameters": lambda one: one.num_parameters,
    "file_bytes": lambda one: one.file_bytes,
    "gflops_per_frame": lambda one: one.gflops,
    "frechet": lambda one: one.frechet and one.frechet.to_original,
    "video.frechet": lambda one: one.frechet and one.frechet.to_ground_truth,
}


@dataclass(frozen=True)
class Requirement:
    """A parsed condition. `decoder` is None for the judged one."""

    text: str
    decoder: str | None
    figure: str
    operator: str
    bound: float


def figure_names() -> tuple[str, ...]:
    """What a condition can refer to: a figure's name alone is against the original's output, `video.NAME` against the
    video, `NAME_retention` the share kept of the original's figure against the video (1 keeps everything)."""
    names = [figure.name for figure in FIGURES]
    shares = [f"{short_name(name)}_retention" for name in RETENTION]
    return (*names, *(f"video.{name}" for name in names), *shares, *_OF_DECODERS)


def parse_requirement(text: str) -> Requirement:
    """Parse a condition.

    Raises:
        RecipeError: not a condition, or about a figure that no report has.
    """
    match = _CONDITION.fullmatch(text.strip())
    try:
        bound = float(match["bound"]) if match else 0.0
    except ValueError:
        match = None
    if match is None:
        raise RecipeError(f"--require {text}: write FIGURE>=NUMBER (or <=, >, <), such as psnr_retention>=0.969.")
    if match["figure"] not in figure_names():
        raise RecipeError(
            f"--require {text}: no figure {match['figure']}{_meant(match['figure'])}; there are "
            f"{', '.join(figure_names())}."
        )
    return Requirement(text.strip(), match["decoder"], match["figure"], match["operator"], bound)


def _meant(figure: str) -> str:
    near = difflib.get_close_matches(figure, figure_names(), n=1, cutoff=0.4)
    near = [name for name in figure_names() if name.startswith(figure)] or near
    return f" (did you mean {near[0]}?)" if near else ""


def require_decoders(requirements: Sequence[Requirement], names: Sequence[str]) -> None:
    """Raise RecipeError if a condition names a decoder that will not be in the report; call it before the work."""
    for one in requirements:
        if one.decoder is not None and one.decoder not in names:
            quoted = "; ".join(f"'{name}'" for name in names)
            raise RecipeError(f"--require {one.text}: no decoder {one.decoder}; there are {quoted}.")


def judge_gates(report: EvaluationReport, requirements: Sequence[Requirement]) -> tuple[GateVerdict, ...]:
    """Whether each condition holds; a figure that was not measured fails it.

    Raises:
        RecipeError: one names a decoder that the report does not have.
    """
    require_decoders(requirements, [one.name for one in report.decoders])
    return tuple(_judge(report, one) for one in requirements)


def _judge(report: EvaluationReport, requirement: Requirement) -> GateVerdict:
    judged = next((one for one in report.decoders[1:] if one.to_original is not None), report.original)
    if requirement.decoder is not None:
        judged = next(one for one in report.decoders if one.name == requirement.decoder)
    value = _value(report, judged, requirement.figure)
    passed = value is not None and _OPERATORS[requirement.operator](value, requirement.bound)
    return GateVerdict(requirement.text, judged.name, value, passed)


def _value(report: EvaluationReport, decoder: DecoderFigures, figure: str) -> float | None:
    if figure in _OF_DECODERS:
        return _OF_DECODERS[figure](decoder)
    if figure.endswith("_retention"):
        name = next(name for name in RETENTION if f"{short_name(name)}_retention" == figure)
        share = retention_percent(report, decoder)[name]
        return None if share is None else share / 100
    if figure.startswith("video."):
        return figure_of(decoder.to_ground_truth, figure.removeprefix("video."))
    return figure_of(decoder.to_original, figure)
