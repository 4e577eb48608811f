"""Show the facts of files as tables and trees in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.printable import counted, printable_line
from flashvaed_cli.report.tables import Cell, Column, TableData, to_rich
from flashvaed_cli.stages.common.ancestry import Ancestor
from flashvaed_cli.stages.info.facts import CoderFacts, FileFacts

_MAX_COMMAND_CHARS = 400
_NUM_SHOWN_FILES = 4
_STATES = {
    "unchanged": "unchanged",
    "changed": "replaced by another file",
    "absent": "no longer there",
}


def show_one(facts: FileFacts, size: str) -> RenderableType:
    """Everything about a file."""
    parts: list[RenderableType] = [to_rich(_summary([facts], size))]
    if facts.decoder is not None:
        parts.append(to_rich(_stage_table(facts.decoder, size)))
    if facts.measured or facts.reports:
        parts.append(to_rich(_measured_table(facts)))
    if facts.parents:
        parts.append(_lineage(facts))
    parts += [Text(printable_line(note)) for note in facts.notes]
    if facts.next_commands:
        parts.append(Text("\nNext:\n" + "\n".join(f"  {printable_line(command)}" for command in facts.next_commands)))
    return Group(*parts)


def show_side_by_side(several: Sequence[FileFacts], size: str) -> RenderableType:
    """What differs between files, and what is the same in all of them."""
    whole = _summary(several, size)
    rows = [*whole.rows, *_stage_rows(several)]
    differing = tuple(row for row in rows if len(set(row[1:])) > 1)
    common = tuple((row[0], row[1]) for row in rows if len(set(row[1:])) == 1 and row[1] is not None)
    parts = [to_rich(TableData("What differs", whole.columns, differing))]
    if common:
        columns = (Column("", align="left"), Column("all files", align="left"))
        parts.append(to_rich(TableData("What is the same", columns, common)))
    return Group(*parts)


def _summary(several: Sequence[FileFacts], size: str) -> TableData:
    columns = (Column("", align="left"), *(Column(printable_line(facts.location), align="left") for facts in several))
    rows: list[tuple[Cell, ...]] = []
    for name, read in _ROWS.items():
        texts = [read(facts) for facts in several]
        if any(texts):
            rows.append((name.format(size=size), *(text or None for text in texts)))
    return TableData("", columns, tuple(rows))


def _of_header(read: Callable[[ArtifactHeader], str | None]) -> Callable[[FileFacts], str | None]:
    return lambda facts: None if facts.header is None else read(facts.header)


def _of_decoder(read: Callable[[CoderFacts], str | None]) -> Callable[[FileFacts], str | None]:
    return lambda facts: None if facts.decoder is None else read(facts.decoder)


def _written_by(header: ArtifactHeader) -> str:
    text = f"flashvaed {header.tool}"
    if (run := header.run) is None:
        return text
    commit = f" (commit {run.commit})" if run.commit else ""
    return (
        f"{text}{commit}, torch {run.torch}, on {run.device} with {run.num_threads} threads, "
        f"{run.started.replace('T', ' ').replace('+00:00', ' UTC')}, in {_duration(run.duration_s)}"
    )


def _data(header: ArtifactHeader) -> str | None:
    if (run := header.run) is None or not run.num_data_files:
        return None
    shown = run.data[:_NUM_SHOWN_FILES]
    named = ", ".join(
        f"{printable_line(file.name)} ({file.sha256[:12] if file.sha256 else f'{file.size_bytes:,d} bytes'})"
        for file in shown
    )
    more = run.num_data_files - len(shown)
    return named + (f" and {more} more" if more else "")


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _all_operators(decoder: CoderFacts) -> dict[str, int]:
    total: dict[str, int] = {}
    for stage in decoder.stages:
        for operator, count in stage.operators.items():
            total[operator] = total.get(operator, 0) + count
    return total


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in counts.items())


def _widths(widths: Iterable[int]) -> str:
    return " > ".join(map(str, widths))


_STREAMING = {True: "causal: any chunk, same frames", False: "sees ahead: chunks overlap"}
_ROWS: dict[str, Callable[[FileFacts], str | None]] = {
    "kind": lambda facts: facts.kind,
    "family": lambda facts: facts.family,
    "recognised by": lambda facts: facts.recognised_by,
    "SHA-256": lambda facts: facts.sha256,
    "SHA-256 of the file": lambda facts: None if facts.file_sha256 == facts.sha256 else facts.file_sha256,
    "size": lambda facts: f"{facts.size_bytes / 1e6:,.2f} MB",
    "number formats": lambda facts: ", ".join(f"{count} x {name}" for name, count in facts.number_formats.items()),
    "decoder": _of_decoder(lambda decoder: f"{decoder.parameters:,d} parameters"),
    "shape": _of_decoder(lambda decoder: decoder.shape and f"{decoder.shape}, a light decoder of other blocks"),
    "GFLOP for {size}": _of_decoder(lambda decoder: None if decoder.gflop is None else f"{decoder.gflop:,.1f}"),
    "encoder": lambda facts: f"{facts.encoder.parameters:,d} parameters" if facts.encoder else None,
    "latents": _of_decoder(
        lambda decoder: (
            f"{decoder.latent_channels} channels, {decoder.spatial_factor} x smaller"
            + ("; single images" if decoder.is_still else f", {counted(decoder.temporal_factor, 'frame')} each")
        )
    ),
    "latent statistics": lambda facts: "there" if facts.latent_statistics else "absent: raw latents only",
    "streaming": _of_decoder(lambda decoder: decoder.whole_clips or _STREAMING[decoder.is_causal]),
    "operators": _of_decoder(lambda decoder: _counts(_all_operators(decoder))),
    "written by": _of_header(_written_by),
    "command": _of_header(lambda header: printable_line(header.command_line, _MAX_COMMAND_CHARS)),
    "data": _of_header(_data),
}


def _stage_table(decoder: CoderFacts, size: str) -> TableData:
    columns = (
        Column("stage", align="left"),
        Column("channels", align="left"),
        Column("layers", "d"),
        Column("operators", align="left"),
        Column("parameters", ",d"),
        Column("GFLOP", ".2f"),
    )
    rows = tuple(
        (one.name, _widths(one.widths), one.num_layers, _counts(one.operators), one.parameters, one.gflop)
        for one in decoder.stages
    )
    return TableData(f"Stages of the decoder; operations for {size}", columns, rows)


def _stage_rows(several: Sequence[FileFacts]) -> list[tuple[Cell, ...]]:
    """Widths and operators stage by stage."""
    names = dict.fromkeys(stage.name for facts in several if facts.decoder for stage in facts.decoder.stages)
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        found = [
            next((stage for stage in facts.decoder.stages if stage.name == name), None) if facts.decoder else None
            for facts in several
        ]
        rows.append((f"{name}: channels", *(None if one is None else _widths(one.widths) for one in found)))
        rows.append((f"{name}: operators", *(None if one is None else _counts(one.operators) for one in found)))
    return rows


def _measured_table(facts: FileFacts) -> TableData:
    rows: list[tuple[Cell, ...]] = list(facts.measured.items())
    rows += [(f"{folder}: {name}", text) for folder, figures in facts.reports.items() for name, text in figures.items()]
    return TableData("What was measured", (Column("", align="left"), Column("figures", align="left")), tuple(rows))


def _lineage(facts: FileFacts) -> Tree:
    tree = Tree(Text(f"Lineage of {printable_line(facts.location)}", style="bold"))
    for parent in facts.parents:
        _grow(tree, parent)
    return tree


def _grow(tree: Tree, ancestor: Ancestor) -> None:
    lineage, header = ancestor.lineage, ancestor.header
    weights = f", weights {lineage.weights}" if lineage.weights else ""
    lines = [
        f"{printable_line(lineage.role)}: {printable_line(lineage.location)}{printable_line(weights)}",
        f"SHA-256 {printable_line(lineage.sha256)[:12]}, {_STATES[ancestor.state]}",
    ]
    if header is not None and header.command_line:
        lines.append(printable_line(header.command_line, _MAX_COMMAND_CHARS))
    if header is not None and header.run is not None:
        lines.append(f"{header.run.started.replace('T', ' ')[:16]} UTC, {_duration(header.run.duration_s)}")
    branch = tree.add(Text("\n".join(lines)))
    for parent in ancestor.parents:
        _grow(branch, parent)
