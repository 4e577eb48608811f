"""Conditions on a report's figures, and what CI reads of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from flashvaed_cli.errors import RecipeError
from flashvaed_cli.ownership import is_own_file
from flashvaed_cli.report.evaluation import DecoderFigures, EvaluationReport, Spread, report_document, report_markdown
from flashvaed_cli.report.gates import figure_names, judge_gates, parse_requirement
from flashvaed_cli.report.junit import write_junit


@dataclass(frozen=True)
class Figures:
    psnr_db: float = 30.0
    ssim: float | None = 0.9
    lpips: float | None = None
    sharpness_ratio: float | None = 0.8
    num_frames: int = 5


REPORT = EvaluationReport(
    decoders=(
        DecoderFigures("original", to_ground_truth=Figures()),
        DecoderFigures("original, exact", speedup=Spread(2.0, 1.9, 2.1)),
        DecoderFigures("flash", Figures(27.0), Figures(40.0, sharpness_ratio=0.95), speedup=Spread(8.0, 7.0, 9.0)),
        DecoderFigures("mild", Figures(29.7), Figures(float("inf")), speedup=Spread(3.0, 2.0, 4.0)),
    ),
    settings={"command": "flashvaed eval a\x1bb"},
)


def verdicts(*conditions: str) -> list[bool]:
    return [gate.passed for gate in judge_gates(REPORT, [parse_requirement(text) for text in conditions])]


@pytest.mark.parametrize(
    ("condition", "passed"),
    [
        ("psnr_retention>=0.9", True),  # 27 of 30, and the bound itself holds
        ("psnr_retention>0.9", False),
        ("psnr_db>=40", True),  # of the judged decoder, to the original
        ("video.psnr_db < 27.5", True),
        ("sharpness_ratio>=0.9", True),
        ("video.sharpness_ratio>=0.9", False),
        ("speedup>=8", True),
        ("speedup_min>=8", False),
        ("mild:psnr_db>=100", True),  # identical frames count the cap
        ("mild:speedup<=3e0", True),
        ("original, exact:speedup>=2", True),
        ("lpips<=0.1", False),  # not measured: a gate that cannot be judged does not hold
        ("original:psnr_db>=1", False),
    ],
)
def test_conditions(condition: str, passed: bool) -> None:
    assert verdicts(condition) == [passed]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("psnr>=30", r"no figure psnr \(did you mean psnr_db\?\); there are psnr_db, ssim"),
        ("psnr_db=30", "write FIGURE>=NUMBER"),
        ("psnr_db>=high", "write FIGURE>=NUMBER"),
        ("psnr_db>=1e", "write FIGURE>=NUMBER"),
        ("", "write FIGURE>=NUMBER"),
    ],
)
def test_no_conditions(condition: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_requirement(condition)


def test_a_decoder_that_is_not_there_is_named() -> None:
    with pytest.raises(RecipeError, match=r"no decoder flsh; there are 'original'; .*'mild'"):
        judge_gates(REPORT, [parse_requirement("flsh:psnr_db>1")])


def test_every_figure_that_is_offered_can_be_asked_for() -> None:
    assert len(figure_names()) > 30
    judge_gates(REPORT, [parse_requirement(f"{name}>=0") for name in figure_names()])


def test_documents_and_junit_say_the_same(tmp_path: Path) -> None:
    gates = judge_gates(REPORT, [parse_requirement("psnr_db>=40"), parse_requirement("lpips<=0.1")])
    report = replace(REPORT, gates=gates)
    assert [gate["passed"] for gate in report_document(report)["gates"]] == [True, False]  # type: ignore[index, union-attr]
    text = report_markdown(report)
    assert "- passed: psnr_db>=40: for flash it is 40\n" in text
    assert "- **failed**: lpips<=0.1: for flash it was not measured\n" in text
    path = tmp_path / "eval.xml"
    write_junit(report, path)
    suite = ElementTree.parse(path).getroot().find("testsuite")
    assert suite is not None and (suite.get("tests"), suite.get("failures")) == ("2", "1")
    cases = {case.get("name"): case.find("failure") for case in suite.iter("testcase")}
    assert cases["psnr_db>=40"] is None
    failure = cases["lpips<=0.1"]
    assert failure is not None and failure.get("message") == "lpips<=0.1: for flash it was not measured"
    assert is_own_file(path)
    path.write_text('<testsuites><testsuite name="pytest"/></testsuites>')
    assert not is_own_file(path)


def test_junit_without_conditions_has_a_case(tmp_path: Path) -> None:
    write_junit(REPORT, tmp_path / "eval.xml")
    root = ElementTree.parse(tmp_path / "eval.xml").getroot()
    assert (root.get("tests"), root.get("failures"), len(list(root.iter("testcase")))) == ("1", "0", 1)
