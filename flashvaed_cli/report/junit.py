"""The conditions of a report as JUnit XML, which CI servers show as tests."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from flashvaed_cli.atomic import atomic_path
from flashvaed_cli.printable import printable_line
from flashvaed_cli.report.evaluation import EvaluationReport


def write_junit(report: EvaluationReport, path: Path) -> None:
    """Write one test case per condition; without conditions, one saying that the evaluation ran.

    Raises:
        OSError: the file cannot be written.
    """
    failed = sum(not gate.passed for gate in report.gates)
    count = {"tests": str(max(len(report.gates), 1)), "failures": str(failed), "errors": "0"}
    suites = ElementTree.Element("testsuites", count)
    suite = ElementTree.SubElement(suites, "testsuite", {"name": "flashvaed eval", "skipped": "0", **count})
    properties = ElementTree.SubElement(suite, "properties")
    for key, value in report.settings.items():
        ElementTree.SubElement(properties, "property", {"name": key, "value": printable_line(str(value))})
    for gate in report.gates:
        names = {"classname": f"flashvaed.eval.{printable_line(gate.decoder)}", "name": printable_line(gate.condition)}
        case = ElementTree.SubElement(suite, "testcase", names)
        if not gate.passed:
            ElementTree.SubElement(case, "failure", {"message": printable_line(gate.text)})
    if not report.gates:
        ElementTree.SubElement(suite, "testcase", {"classname": "flashvaed.eval", "name": "evaluation"})
    ElementTree.indent(suites)
    with atomic_path(path) as sibling:
        ElementTree.ElementTree(suites).write(sibling, encoding="utf-8", xml_declaration=True)
