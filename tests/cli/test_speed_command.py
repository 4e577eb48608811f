"""`eval --speed` on the toy VAE: its tables, files and mistakes. What it measures is not looked at."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from flashvaed_cli.artifact.checkpoint import derived_header, load_checkpoint, save_checkpoint
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.predict.planning import choose_plan
from flashvaed_cli.decoders.variants.exact import exact_spec
from flashvaed_cli.decoders.variants.still import still_decoder
from flashvaed_cli.families.wan21.spec import WAN21, wan_decoder_spec
from flashvaed_cli.stages.common import memory_fit
from flashvaed_cli.stages.speed import contestants
from flashvaed_cli.stages.speed import table as speed_table
from flashvaed_cli.stages.speed.table import TimedSize
from flashvaed_cli.surgery.respec import converted_spec
from tests.commands import invoke, strict_json, succeed
from tests.toy import BASE_WIDTH, write_toy_vae

SPEED = "--speed --sizes 16x24 --frames 5 --num-speed-rounds 1"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Rates after one call; and without diffusers, which takes seconds to import, but where it is meant."""
    measure = speed_table.measure_rates
    monkeypatch.setattr(speed_table, "measure_rates", lambda device, dtype: measure(device, dtype, budget_s=0.001))
    if "diffusers" not in request.node.name:
        monkeypatch.setattr(speed_table, "diffusers_fault", lambda _: "diffusers is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE, and a decoder of it in the paper's operators."""
    folder = tmp_path_factory.mktemp("speed")
    vae = load_checkpoint(write_toy_vae(folder / "vae.safetensors"), builtins={})
    flash = Decoder(converted_spec(wan_decoder_spec(BASE_WIDTH), WAN21.paper_operators))
    save_checkpoint(folder / "flash.safetensors", derived_header(vae), decoder=flash)
    return folder


def rows_of(document: dict[str, Any], table: int = 0) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in document["tables"][table]["rows"]}


def test_tables_and_files(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "report"
    printed = succeed(f"eval flash.safetensors {SPEED} -o '{output}'", cwd=folder)
    document = strict_json((output / "speed.json").read_text(encoding="utf-8"))
    assert printed["tables"] == document["tables"]
    assert sorted(path.name for path in output.iterdir()) == ["speed.json", "speed.md"]
    table = document["tables"][0]
    assert (table["num_frames"], table["height"], table["width"], table["dtype"]) == (5, 24, 16, "float32")
    rows = rows_of(document)
    assert list(rows) == ["original, eager", "original, exact", "flash"]
    for name, row in rows.items():
        assert row["failure"] is None and row["compile_s"] is None
        assert row["seconds"]["min"] <= row["seconds"]["median"] <= row["seconds"]["max"]
        assert row["cold_start_s"] > 0 and row["gflop"] > 0 and row["traffic_bytes"] > 0
        assert (row["over_eager"] is None) == (name == "original, eager")
        assert (row["over_exact"] is None) == (name == "original, exact")
    assert rows["flash"]["gflop"] < rows["original, eager"]["gflop"]
    assert document["settings"]["rounds"] == 1
    # Without diffusers our own eager form is the baseline, and named as such.
    assert any("our own decoder with plain operators: diffusers is not installed" in n for n in printed["notes"])


def test_sizes_and_lengths_are_multiplied_and_rounded_up(folder: Path, tmp_path: Path) -> None:
    words = f"eval vae.safetensors --speed --sizes 16x8,10x10 --frames 1,4 --num-speed-rounds 1 -o '{tmp_path}'"
    result = invoke(f"{words} --json --no-video", cwd=folder)
    assert result.exit_code == 0, result.stderr
    tables = strict_json(result.stdout)["tables"]
    assert [(t["num_frames"], t["width"], t["height"]) for t in tables] == [
        (1, 16, 8), (5, 16, 8), (1, 16, 16), (5, 16, 16),
    ]  # fmt: skip
    assert "4 frames of 10×10 are timed as 5 frames of 16×16" in result.stderr
    assert "--no-video: ignored with --speed" in result.stderr


def test_decoders_of_single_images_are_timed_on_one_frame(folder: Path, tmp_path: Path) -> None:
    vae = load_checkpoint(folder / "vae.safetensors", builtins={})
    save_checkpoint(tmp_path / "still.safetensors", derived_header(vae), decoder=still_decoder(vae.require_decoder()))
    words = f"eval '{tmp_path / 'still.safetensors'}' --speed --sizes 16x8 --num-speed-rounds 1"
    for frames in ("", "--frames 1"):
        printed = succeed(f"{words} {frames} -o '{tmp_path / 'out'}'", cwd=folder)
        assert [table["num_frames"] for table in printed["tables"]] == [1] and printed["stderr"] == ""
    refused = invoke(f"{words} --frames 1,5,9 -o '{tmp_path / 'refused'}'", cwd=folder)
    assert refused.exit_code == 2 and not (tmp_path / "refused").exists()
    assert "--frames 5,9: still decodes single images; give --frames 1, or leave it out" in refused.stderr
    assert "timing" not in refused.stderr  # before any work


def test_nine_frames_are_timed_by_default(folder: Path, tmp_path: Path) -> None:
    printed = succeed(f"eval vae.safetensors --speed --sizes 8x8 --num-speed-rounds 1 -o '{tmp_path}'", cwd=folder)
    assert [table["num_frames"] for table in printed["tables"]] == [9]


def test_what_fits_nowhere_is_an_error(folder: Path, tmp_path: Path) -> None:
    result = invoke(f"eval vae.safetensors {SPEED} --max-memory 1MB -o '{tmp_path / 'out'}'", cwd=folder)
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert "none of our decoders fits into memory: 2 x 3 x 2 latents do not decode within 0.001 GB" in result.stderr


def test_every_row_of_ours_says_its_chunk(folder: Path, tmp_path: Path) -> None:
    printed = succeed(f"eval vae.safetensors {SPEED} --chunk 1 --tile 2 -o '{tmp_path}'", cwd=folder)
    for row in rows_of(printed).values():
        assert row["way"].endswith(", chunk 1, tiles of 2 latents")


def test_terminal_and_compare(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "flash.safetensors").write_bytes((folder / "flash.safetensors").read_bytes())
    words = f"eval flash.safetensors {SPEED} --compare '{tmp_path / 'flash.safetensors'}' -q -o '{tmp_path / 'out'}'"
    result = invoke(words, cwd=folder)
    assert result.exit_code == 0 and result.stderr == ""
    assert "flash-2" in result.stdout and "× exact (range)" in result.stdout and "% of matmul" in result.stdout
    assert max(map(len, result.stdout.splitlines()[:20])) <= 120


def test_diffusers_decodes_the_same(folder: Path) -> None:
    pytest.importorskip("diffusers")
    decoder = load_checkpoint(folder / "vae.safetensors", builtins={}).require_decoder()
    latents = torch.randn(1, 16, 2, 2, 3)
    assert contestants.diffusers_fault(decoder) is None
    theirs = contestants.diffusers_call(decoder, latents)()
    with torch.no_grad():
        ours = contestants.own_call(decoder, latents, contestants.PLAIN_EAGER, memory_fit.Limits())()
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)  # float32 sums in another order
    converted = load_checkpoint(folder / "flash.safetensors", builtins={}).require_decoder()
    assert "has no decoder like it" in str(contestants.diffusers_fault(converted))


def test_diffusers_is_the_first_row(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    printed = succeed(f"eval vae.safetensors {SPEED} -o '{tmp_path}'", cwd=folder)
    rows = rows_of(printed)
    assert list(rows) == ["diffusers, eager", "original, eager", "original, exact"]
    assert rows["diffusers, eager"]["over_eager"] is None and rows["original, eager"]["over_eager"]["median"] > 0


def test_where_diffusers_does_not_fit_our_eager_row_is_the_baseline(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashvaed_cli.stages.speed.table.refusal_at_chunk_one", lambda *_: "needs about 99 GB of memory")
        printed = succeed(f"eval vae.safetensors {SPEED} --pipeline-seconds 1 -o '{tmp_path}'", cwd=folder)
    rows = rows_of(printed)
    assert rows["diffusers, eager"]["failure"] == "does not fit"
    assert rows["original, eager"]["over_eager"] is None and rows["original, exact"]["over_eager"]["median"] > 0
    assert all(rows[name]["pipeline"] for name in ("original, eager", "original, exact"))


def test_memory_decides_what_runs_and_how(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, latents, limits = wan_decoder_spec(8), torch.empty(1, 16, 9, 8, 8), memory_fit.Limits()
    grid = (9, 8, 8)
    whole, least = choose_plan(spec, grid).predicted_bytes, choose_plan(spec, grid, chunk=1).predicted_bytes

    def fit(free: int | None, limits: memory_fit.Limits = limits) -> memory_fit.Fit:
        monkeypatch.setattr(memory_fit, "free_bytes", lambda _: free)
        return memory_fit.fit_to_memory(spec, latents, limits)

    assert fit(None) == fit(2 * whole) == memory_fit.Fit(limits)
    bounded = fit((whole + least) // 2)
    assert bounded.refusal is None and bounded.limits.max_memory_bytes is not None
    assert bounded.limits.max_memory_bytes < whole and ", chunk " in bounded.remark
    refused = fit(10**6)
    assert refused.refusal is not None and "do not decode within" in refused.refusal
    asked = fit(10**12, memory_fit.Limits(chunk=2, max_memory_bytes=whole))
    assert asked.limits == memory_fit.Limits(chunk=2, max_memory_bytes=whole) and asked.refusal is None
    assert memory_fit.refusal_at_chunk_one(spec, latents) is None
    fit(10**6)
    assert "GB are free" in str(memory_fit.refusal_at_chunk_one(spec, latents))


def test_autotune_is_remembered(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHVAED_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("flashvaed_cli.metrics.autotune._NUM_ROUNDS", 1)
    monkeypatch.setattr("flashvaed_cli.metrics.autotune._FORMATS", ("channels-last",))
    words = f"eval vae.safetensors {SPEED} --frames 1 --autotune -o '{tmp_path / 'out'}'"
    first = succeed(words, cwd=folder)
    (cache,) = (tmp_path / "cache" / "flashvaed" / "autotune").iterdir()
    way = rows_of(first)["original, exact"]["way"]
    assert any(f"{way} is the fastest of" in note for note in first["notes"])
    monkeypatch.setattr("flashvaed_cli.stages.speed.tuning.autotune", None)  # must not be asked again
    second = succeed(words, cwd=folder)
    assert rows_of(second)["original, exact"]["way"] == way
    assert any(f"{way} (remembered in {cache})" in note for note in second["notes"])


def test_a_folder_of_an_evaluation_takes_the_speed_too(folder: Path, tmp_path: Path) -> None:
    report = '{"kind": "flashvaed report"}'
    (tmp_path / "report.json").write_text(report, encoding="utf-8")
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    succeed(f"eval vae.safetensors {SPEED} -o '{tmp_path}'", cwd=folder)
    assert (tmp_path / "report.json").read_text(encoding="utf-8") == report


def test_any_report_json_does_not_make_a_folder_ours(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}", encoding="utf-8")
    result = invoke(f"eval vae.safetensors {SPEED} -o '{tmp_path}' -q", cwd=folder)
    assert result.exit_code == 2 and "holds other files" in result.stderr


def test_other_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    result = invoke(f"eval vae.safetensors {SPEED} -o '{tmp_path}' -q", cwd=folder)
    assert result.exit_code == 2 and re.search("holds other files.*--force", result.stderr)


def test_no_compiler_is_a_mistake_at_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(speed_table, "run_contest", None)
    result = invoke(f"eval vae.safetensors {SPEED} --compile -o '{tmp_path}' -q", cwd=folder)
    assert result.exit_code == 2 and "no-such-compiler" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_rounding_of_a_clip() -> None:
    spec = wan_decoder_spec(4)
    size = TimedSize(10, 33, 40)
    assert size.grid(spec) == (4, 5, 5)
    assert size.rounded(spec) == TimedSize(13, 40, 40)
    assert TimedSize(1, 8, 8).rounded(spec) == TimedSize(1, 8, 8)


def test_half_precision_counts_the_operators_that_run() -> None:
    spec = exact_spec(wan_decoder_spec(32))
    operators = {layer.operator for _, layer in spec.layers()}
    half = {layer.operator for _, layer in speed_table.counted_spec(spec, torch.bfloat16).layers()}
    assert "winograd3d" in operators and half == operators - {"winograd3d"}
    assert speed_table.counted_spec(spec, torch.float32) == spec


def test_a_pipeline_gains_what_its_decoding_loses(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "report"
    printed = succeed(f"eval flash.safetensors {SPEED} --pipeline-seconds 0.5 -o '{output}'", cwd=folder)
    rows = printed["tables"][0]["rows"]
    eager_s = rows[0]["seconds"]["median"]
    for row in rows:
        if row["seconds"] is None:
            assert row["pipeline"] is None
            continue
        total_s = 0.5 + row["seconds"]["median"]
        assert row["pipeline"] == pytest.approx(
            {
                "rest_s": 0.5,
                "total_s": total_s,
                "decoding_percent": 100 * row["seconds"]["median"] / total_s,
                "speedup": (0.5 + eager_s) / total_s,
            }
        )
    assert "Pipeline whose other steps take 0.5 s: 5 frames" in (output / "speed.md").read_text(encoding="utf-8")
