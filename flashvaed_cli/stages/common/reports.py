"""Find evaluations of a decoder in the folders beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flashvaed_cli.report.evaluation import REPORT_JSON

_MAX_REPORT_BYTES = 16_000_000


def find_reports(decoder: Path, sha256: str) -> dict[str, dict[str, str]]:
    """The main figures of every report in a `report*` folder beside `decoder` that judged a file of this hash.

    Returns: folder name to figures by name.
    """
    found: dict[str, dict[str, str]] = {}
    for path in sorted(decoder.parent.glob(f"report*/{REPORT_JSON}")):
        try:
            if path.stat().st_size > _MAX_REPORT_BYTES:
                continue
            document = json.loads(path.read_bytes())
            if document["settings"].get("sha256") == sha256:
                found[path.parent.name] = _figures(document)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError):
            continue  # somebody else's report.json
    return found


def _figures(document: Mapping[str, Any]) -> dict[str, str]:
    judged = next(one for one in document["decoders"][1:] if one["to_original"])  # the decoders compared with it follow
    figures: dict[str, str] = {}
    kept, speedup = judged["retention_percent"], judged["speedup"]
    for key, name in (("psnr_db", "PSNR kept"), ("ssim", "SSIM kept"), ("sharpness_ratio", "sharpness kept")):
        if kept.get(key) is not None:
            figures[name] = f"{kept[key]:.1f} %"
    if judged["to_original"] is not None and judged["to_original"]["psnr_db"] is not None:
        figures["PSNR to the original"] = f"{judged['to_original']['psnr_db']:.2f} dB"
    if speedup:
        figures["speed-up over the original"] = f"{speedup['median']:.2f}x"
    figures["measured on"] = str(document["settings"].get("device", "?"))
    return figures
