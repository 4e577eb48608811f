"""`flashvaed eval`: the original decoder and derived ones on the same latents, side by side.

Videos are read, encoded, decoded by all and compared chunk by chunk, so memory does not grow with their length, and of
many clips only the worst keep their pictures. Processes of one launch share the clips.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flashvaed_cli.artifact.checkpoint import Checkpoint, locate
from flashvaed_cli.artifact.foreign.weights import checkpoint_files
from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.artifact.store import read_header, sha256_of_files
from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.predict.cost import total_gflop
from flashvaed_cli.decoders.predict.lookahead import usual_chunk
from flashvaed_cli.decoders.spec.light import light_shape
from flashvaed_cli.decoders.variants.exact import exact_decoder
from flashvaed_cli.decoders.variants.half_range import cast_decoder
from flashvaed_cli.distill.ranks import Ranks, joined_ranks
from flashvaed_cli.errors import FlashVaedError, MediaError, MetricUnavailableError
from flashvaed_cli.media.clips import usable_files
from flashvaed_cli.media.cuts import none_usable
from flashvaed_cli.media.latent_files import is_latent_file
from flashvaed_cli.media.video import probe_video
from flashvaed_cli.metrics.frechet import load_extractor
from flashvaed_cli.metrics.lpips_metric import LpipsMetric, load_lpips
from flashvaed_cli.metrics.quality import QualityResult, mean_quality
from flashvaed_cli.metrics.vmaf import find_ffmpeg
from flashvaed_cli.ownership import has_own_header
from flashvaed_cli.paths import user_path
from flashvaed_cli.printable import counted
from flashvaed_cli.progress import Progress, SilentProgress
from flashvaed_cli.recipe.evaluate import EvalRecipe
from flashvaed_cli.report.evaluation import (
    REPORT_JSON,
    ClipFigures,
    DecoderFigures,
    EvaluationReport,
    report_document,
    save_report,
    summary_table,
)
from flashvaed_cli.report.gates import judge_gates, parse_requirement, require_decoders
from flashvaed_cli.report.junit import write_junit
from flashvaed_cli.report.page.page import PAGE, render_page
from flashvaed_cli.report.speed import SPEED_JSON
from flashvaed_cli.stages.common.clips import find_data
from flashvaed_cli.stages.common.compared import derived_decoders, distinct_names
from flashvaed_cli.stages.common.fitted_clips import latent_grid, whole_side
from flashvaed_cli.stages.common.loading import DTYPES, Inputs, choose_device
from flashvaed_cli.stages.common.outputs import (
    claim_file,
    filled_at_the_end,
    moved,
    refuse_to_replace,
    require_apart,
)
from flashvaed_cli.stages.common.result import StageOutcome
from flashvaed_cli.stages.common.run import Run
from flashvaed_cli.stages.common.up_to_date import finished_folder, provenance
from flashvaed_cli.stages.evaluate.compare import ORIGINAL, VIDEO, ClipToJudge, Comparison, compare_clip
from flashvaed_cli.stages.evaluate.judge import FeatureJudge, Metrics
from flashvaed_cli.stages.evaluate.less_memory import SteppingDown
from flashvaed_cli.stages.evaluate.page import page_extras
from flashvaed_cli.stages.evaluate.seen import warn_of_seen
from flashvaed_cli.stages.evaluate.timing import ORIGINAL_TUNED, runtime_of, timed
from flashvaed_cli.zoo.builtin import BUILTINS, JUDGED_CLIP

MAX_PICTURED = 12
"""Clips that keep pictures and videos: those where the first student is worst."""


@dataclass
class _Tally:
    """The results of one process's clips so far."""

    rows: list[ClipFigures] = field(default_factory=list)
    pictured: list[Comparison] = field(default_factory=list)
    broken: dict[Path, str] = field(default_factory=dict)
    latents: Tensor | None = None

    def add(self, comparison: Comparison) -> None:
        """Keep the figures, and the pictures of the worst."""
        self.rows += comparison.rows
        self.latents = comparison.latents if self.latents is None else self.latents
        self.pictured.append(comparison)
        self.keep_worst()

    def keep_worst(self) -> None:
        """Remove the pictures of all but the worst `MAX_PICTURED`."""
        worst_first = sorted(self.pictured, key=lambda one: one.album.worst_psnr_db)
        for left_out in worst_first[MAX_PICTURED:]:
            for path in left_out.files:
                path.unlink(missing_ok=True)
        kept = {id(one) for one in worst_first[:MAX_PICTURED]}
        self.pictured = [one for one in self.pictured if id(one) in kept]


def run_evaluate(recipe: EvalRecipe, *, progress: Progress, force: bool, command_line: str) -> StageOutcome:
    """Compare all decoders on every clip, time them in alternation, write report, page and pictures.

    Started by `accelerate launch` or torchrun, each process judges its share of the clips; only the main one measures
    times, writes and logs.

    Raises:
        ArtifactError: decoder or original cannot be loaded.
        MediaError: no readable clip (a damaged one is skipped and named in the notes), or sides that hold no latent.
        MetricUnavailableError: a metric that was asked for by name cannot be measured here.
        RecipeError: a requirement names no figure.
        FlashVaedError: the output folder holds files of something else.
    """
    with joined_ranks(choose_device(recipe.device)) as (ranks, device):
        progress = progress if ranks.is_main else SilentProgress()
        return _run(recipe, ranks, device, progress, force=force, command_line=command_line)


def _run(
    recipe: EvalRecipe, ranks: Ranks, device: torch.device, progress: Progress, *, force: bool, command_line: str
) -> StageOutcome:
    requirements = [parse_requirement(text) for text in recipe.require]
    run = Run.open_folder(
        recipe,
        REPORT_JSON,
        SPEED_JSON,
        progress=progress,
        force=force,
        command_line=command_line,
        from_main=ranks.from_main,
    )
    output, location = run.output, run.location
    junit = None if recipe.junit is None else user_path(recipe.junit)
    if junit is not None:
        ranks.from_main(lambda: _claim_junit(junit, recipe, output, force=force))
    if (done := _finished(recipe, output, location, force=force)) is not None:
        return done
    inputs = run.load(device)
    if recipe.max_side is not None:
        whole_side("max_side", recipe.max_side, latent_grid(inputs.original))  # refuses sides that hold no latent
    asked, notes = recipe, list[str]()
    metrics = _metrics(recipe, device, notes)
    features = None if metrics.features is None else FeatureJudge(metrics.features)
    decoders = _decoders(inputs, recipe)
    if any(decoder.spec.still for decoder in decoders.values()) and recipe.num_frames != 1:
        recipe = recipe.model_copy(update={"num_frames": 1})
        notes.append("Only the first frame of every clip is judged, because one of the decoders takes single images.")
    require_decoders(requirements, [*decoders, *((ORIGINAL_TUNED,) if len(decoders) > 1 else ())])
    contest = SteppingDown({name: runtime_of(name, one, recipe) for name, one in decoders.items()}, recipe, progress)
    found = find_data(recipe.data, default=(JUDGED_CLIP,))
    files, broken = usable_files(found, recipe.num_clips, latent_width=inputs.original.latent_width)
    clips = _named(files)
    reads = (location, recipe.original, *recipe.compare, *files)
    refuse_to_replace((output / f"{clip.stem}{suffix}" for clip in clips for suffix in (".png", ".mp4")), reads)
    chunk = max(usual_chunk(decoder.spec) for decoder in decoders.values())
    tally = _Tally(broken=dict(broken) if ranks.is_main else {})
    with _shared_draft(ranks, output, reads, force=force) as draft:
        for clip in clips[ranks.rank :: ranks.count]:
            try:
                parts = {"inputs": inputs, "metrics": metrics, "features": features, "output": draft}
                compare = partial(compare_clip, clip, **parts, progress=progress)
                tally.add(contest.run(compare, chunk=chunk, features=features))
            except MediaError as error:  # damaged, as only decoding shows
                tally.broken[clip.path] = str(error)
                for suffix in (".png", ".mp4"):
                    (draft / f"{clip.stem}{suffix}").unlink(missing_ok=True)
        tally = _gathered(tally, [clip.shown for clip in clips], ranks)
        if features is not None:
            for name in (VIDEO, *decoders):
                features.share(name, ranks)
        for path, reason in tally.broken.items():
            progress.warn(f"skipped {path}: {reason}")
            notes.append(f"skipped {path.name}: {reason}")
        if not tally.rows or tally.latents is None:
            raise none_usable(len(tally.broken), tally.broken)
        if not ranks.is_main:
            return StageOutcome((), ())
        judged = [path for path in files if path not in tally.broken]
        notes += [*_notes_on_colours(judged), *_notes_on_seen(inputs.checkpoint, recipe, judged, progress)]
        figures = [_figures(name, decoder, tally, features) for name, decoder in decoders.items()]
        if features is not None and (few := features.warning()) is not None:
            notes.append(few)
        if (short := _too_short(tally.rows, recipe)) is not None:
            notes.append(short)
        if len(judged) > MAX_PICTURED:
            notes.append(f"pictures and videos are kept of the {MAX_PICTURED} worst of {len(judged)} clips")
        time = partial(timed, figures, original=decoders[ORIGINAL], latents=tally.latents, device=device)
        figures = contest.run(partial(time, progress=progress), chunk=tally.latents.shape[2])
        notes += contest.notes
        pictures = tuple(path for comparison in tally.pictured for path in comparison.files)
        report = EvaluationReport(
            decoders=tuple(figures),
            clips=tuple(tally.rows),
            settings=_settings(recipe, inputs, tally.latents, ranks, command_line),
            notes=tuple(notes),
            made_with=provenance(asked, _hashes(inputs, recipe), judged),
            files={path.name: path.name for path in pictures},
        )
        report = replace(report, gates=judge_gates(report, requirements))
        written = save_report(report, draft)
        page = draft / PAGE
        albums = [comparison.album for comparison in tally.pictured]
        page.write_text(
            render_page(report, page_extras(inputs.checkpoint, albums, command_line)),
            encoding="utf-8",
            errors="backslashreplace",
        )
    if junit is not None:
        write_junit(report, junit)
    paths = moved((page, written["markdown"], written["json"], *pictures), output)
    paths = paths if junit is None else (*paths, junit)
    document = {**report_document(report), "report": str(output / REPORT_JSON)}
    return StageOutcome(paths, (summary_table(report),), document, tuple(notes))


@contextmanager
def _shared_draft(ranks: Ranks, output: Path, reads: Sequence[str | Path | None], *, force: bool) -> Iterator[Path]:
    """The main process's draft folder, which all processes write pictures to."""
    if ranks.is_main:
        with filled_at_the_end(output, REPORT_JSON, reads, force=force) as draft:
            yield ranks.from_main(lambda: draft)
    else:
        yield ranks.from_main(lambda: output)


def _gathered(tally: _Tally, order: Sequence[str], ranks: Ranks) -> _Tally:
    """The clips of all processes, in the order of the files."""
    if ranks.count == 1:
        return tally
    tallies = ranks.gather(replace(tally, latents=None if tally.latents is None else tally.latents.cpu()))
    position = {name: index for index, name in enumerate(order)}
    together = _Tally(latents=next((one.latents for one in tallies if one.latents is not None), None))
    for one in tallies:
        together.rows += one.rows
        together.pictured += one.pictured
        together.broken |= one.broken
    together.rows.sort(key=lambda row: position[row.clip])
    together.pictured.sort(key=lambda one: position[one.rows[0].clip])
    if ranks.is_main:
        together.keep_worst()
    return together


def _claim_junit(junit: Path, recipe: EvalRecipe, output: Path, *, force: bool) -> None:
    """Claim the JUnit file; refuse a file that the command reads, even with `force`."""
    require_apart(junit, (recipe.input, recipe.original, *recipe.compare, *recipe.data), flag="--junit")
    if junit.absolute() == output.absolute():
        raise FlashVaedError(f"{junit} is the folder of the report; give --junit the name of a file.")
    claim_file(junit, force=force)


def _finished(recipe: EvalRecipe, output: Path, location: str, *, force: bool) -> StageOutcome | None:
    """The report of an earlier run on the same files; None if there is none, or its JUnit file is gone."""
    done = finished_folder(
        output / REPORT_JSON, recipe, location, lambda: find_data(recipe.data, default=(JUDGED_CLIP,)), force=force
    )
    if done is None or (recipe.junit is not None and not user_path(recipe.junit).exists()):
        return None
    return replace(done, figures={**done.figures, "report": str(output / REPORT_JSON)})


def _hashes(inputs: Inputs, recipe: EvalRecipe) -> dict[str, str]:
    """SHA-256 of the decoders read, by location."""
    read = {one.location: one.sha256 for one in (inputs.checkpoint, inputs.original)}
    return read | {
        place: sha256_of_files(checkpoint_files(locate(place, BUILTINS, may_download=False)))
        for place in recipe.compare
    }


def _named(files: Sequence[Path]) -> list[ClipToJudge]:
    """Every file with a unique name: its path if two share a file name."""
    names = [path.name for path in files]
    stems = distinct_names(files)
    return [
        ClipToJudge(path, str(path) if names.count(path.name) > 1 else path.name, stem)
        for path, stem in zip(files, stems, strict=True)
    ]


def _too_short(rows: Sequence[ClipFigures], recipe: EvalRecipe) -> str | None:
    """A note on the clips that are too short for the protocol; None if there are none."""
    if recipe.protocol is None or recipe.num_frames is None:
        return None
    short = {row.clip: row.num_frames for row in rows if row.num_frames < recipe.num_frames}
    if not short:
        return None
    listed = ", ".join(f"{name} ({frames} frames)" for name, frames in list(short.items())[:3])
    more = f" and {len(short) - 3} more" if len(short) > 3 else ""
    return (
        f"{recipe.protocol} judges {recipe.num_frames} frames of each clip, and {listed}{more} have fewer: these "
        "figures are not those of the protocol"
    )


def _notes_on_colours(paths: Iterable[Path]) -> list[str]:
    """Notes on the clips that are judged in other colours than they are stored in."""
    videos = [path for path in paths if not is_latent_file(path)]
    return [f"{path.name}: {how}." for path in videos if (how := probe_video(path).tone_mapping)]


def _notes_on_seen(checkpoint: Checkpoint, recipe: EvalRecipe, files: Sequence[Path], progress: Progress) -> list[str]:
    """Notes on decoders that are judged on clips they were fitted to; also warned of at once."""
    headers: list[tuple[str, ArtifactHeader | None]] = [(checkpoint.location, checkpoint.header)]
    headers += [(place, read_header(place)) for place in recipe.compare if has_own_header(Path(place))]
    notes = [warn_of_seen(Path(place).name, header, place, files) for place, header in headers]
    for note in filter(None, notes):
        progress.warn(note)
    return [note for note in notes if note is not None]


def _settings(
    recipe: EvalRecipe, inputs: Inputs, latents: Tensor, ranks: Ranks, command_line: str
) -> dict[str, str | int | float]:
    """The conditions of the measurement, for the report. `latents`: those used for timing."""
    device = inputs.device.type
    settings: dict[str, str | int | float] = {
        "command": command_line,
        "decoder": inputs.checkpoint.location,
        "sha256": inputs.checkpoint.sha256,
        "original": inputs.original.location,
        "device": f"{device}, {counted(torch.get_num_threads(), 'thread')}" if device == "cpu" else device,
        "dtype": recipe.dtype,
        "speed": f"in alternation, {recipe.num_speed_rounds} rounds at most, latents {list(latents.shape)}",
    }
    if recipe.pipeline_seconds is not None:
        settings["pipeline"] = f"its other steps take {recipe.pipeline_seconds:g} s for a clip of these latents"
    if recipe.protocol is not None:
        settings["protocol"] = f"{recipe.protocol}: {recipe.num_frames} frames, middle {recipe.center_crop} px square"
    if recipe.features is not None:
        settings["features"] = f"{recipe.features}, {recipe.features_input}, {recipe.features_size} px"
    return settings | ({"processes": ranks.count} if ranks.count > 1 else {})


def _metrics(recipe: EvalRecipe, device: torch.device, notes: list[str]) -> Metrics:
    features = None
    if recipe.features is not None:
        features = load_extractor(
            recipe.features,
            device,
            takes=recipe.features_input,
            num_frames=recipe.features_frames,
            size=recipe.features_size,
            pixels=recipe.features_range,
        )
    return Metrics(
        _lpips(recipe, device, notes), _ffmpeg(recipe, notes), needs_vmaf=recipe.vmaf == "on", features=features
    )


def _ffmpeg(recipe: EvalRecipe, notes: list[str]) -> str | None:
    if recipe.vmaf == "off":
        return None
    try:
        return find_ffmpeg()
    except MetricUnavailableError as error:
        if recipe.vmaf == "on":
            raise
        notes.append(str(error))
        return None


def _lpips(recipe: EvalRecipe, device: torch.device, notes: list[str]) -> LpipsMetric | None:
    if recipe.lpips == "off":
        return None
    try:
        return load_lpips("alex", device, allow_download=recipe.allow_download)
    except MetricUnavailableError as error:
        if recipe.lpips == "on":
            raise
        notes.append(f"LPIPS is left out: {error.short}." if error.short else f"LPIPS is left out. {error}")
        return None


def _decoders(inputs: Inputs, recipe: EvalRecipe) -> dict[str, Decoder]:
    """The original first; then the derived ones by file name, with exact operators.

    Raises:
        ArtifactError: a decoder to compare with cannot be loaded, or is of another original.
    """
    dtype = DTYPES[recipe.dtype]
    derived = derived_decoders(inputs, recipe, taken=(VIDEO, ORIGINAL, ORIGINAL_TUNED))
    tuned = {name: cast_decoder(exact_decoder(decoder), dtype) for name, decoder in derived.items()}
    return {ORIGINAL: cast_decoder(inputs.original.require_decoder(), dtype), **tuned}


def _figures(name: str, decoder: Decoder, tally: _Tally, features: FeatureJudge | None) -> DecoderFigures:
    rows = [row for row in tally.rows if row.decoder == name]
    to_video = [row.to_ground_truth for row in rows if isinstance(row.to_ground_truth, QualityResult)]
    to_original = [row.to_original for row in rows if isinstance(row.to_original, QualityResult)]
    latents = tally.latents
    assert latents is not None
    num_frames = decoder.spec.num_frames(latents.shape[2])
    return DecoderFigures(
        name=name,
        to_ground_truth=mean_quality(to_video) if to_video else None,
        to_original=mean_quality(to_original) if to_original else None,
        num_parameters=decoder.parameter_count,
        file_bytes=decoder.parameter_count * torch.float32.itemsize,
        gflops=total_gflop(decoder.spec, (latents.shape[2], latents.shape[3], latents.shape[4])) / num_frames,
        frechet=None if features is None else features.distances(name, video=VIDEO, original=ORIGINAL),
        shape=light_shape(decoder.spec),
    )
