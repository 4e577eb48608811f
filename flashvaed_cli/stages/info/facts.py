"""Everything known about one file, as plain data: what `flashvaed info` shows and `--json` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashvaed_cli.artifact.checkpoint import ARTIFACT_LAYOUT, Checkpoint, locate
from flashvaed_cli.artifact.foreign.flash_folder import FLASH_CLASS
from flashvaed_cli.artifact.foreign.weights import checkpoint_files
from flashvaed_cli.artifact.header import ArtifactHeader
from flashvaed_cli.artifact.store import content_sha256, read_header, sha256_of
from flashvaed_cli.decoders.modules.coder import Decoder, Encoder
from flashvaed_cli.decoders.predict.cost import stage_costs
from flashvaed_cli.decoders.spec.addresses import stage_of
from flashvaed_cli.decoders.spec.coders import CoderSpec, DecoderSpec
from flashvaed_cli.decoders.spec.light import light_shape
from flashvaed_cli.errors import FlashVaedError
from flashvaed_cli.ownership import has_own_header
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.info import InfoRecipe
from flashvaed_cli.recipe.quantities import parse_bucket
from flashvaed_cli.stages.common.ancestry import Ancestor, find_parents
from flashvaed_cli.stages.common.loading import load_input
from flashvaed_cli.stages.common.reports import find_reports
from flashvaed_cli.stages.info.measured import measured_figures
from flashvaed_cli.stages.info.next_step import next_commands
from flashvaed_cli.untrusted.safetensors_file import read_index
from flashvaed_cli.zoo.builtin import BUILTINS


@dataclass(frozen=True)
class StageFacts:
    """One stage. `widths`: channels that enter, and that leave each block; `gflop`: for the size asked for."""

    name: str
    widths: tuple[int, ...]
    num_layers: int
    operators: Mapping[str, int]
    parameters: int
    gflop: float


@dataclass(frozen=True)
class CoderFacts:
    """A decoder or an encoder.

    Attributes:
        shape: that of a light decoder; None: the family's own blocks.
        whole_clips: how a decoder that sees whole clips takes them; None for others.
        gflop: for the size asked for; None for encoders, whose stages have 0: they are not counted.
    """

    parameters: int
    shape: str | None
    latent_channels: int
    temporal_factor: int
    spatial_factor: int
    is_causal: bool
    whole_clips: str | None
    is_still: bool
    gflop: float | None
    stages: tuple[StageFacts, ...]


@dataclass(frozen=True)
class FileFacts:
    """One file.

    Attributes:
        recognised_by: how its family was recognised.
        sha256: the hash by which other artifacts name it; for an artifact, that of its content.
        file_sha256: that of the whole file; None for folders.
        number_formats: number of stored tensors by format; empty if only loading would show it.
        measured: figures by name, with units.
    """

    location: str
    kind: str
    family: str
    recognised_by: str
    sha256: str
    file_sha256: str | None
    size_bytes: int
    number_formats: Mapping[str, int]
    latent_statistics: bool
    decoder: CoderFacts | None
    encoder: CoderFacts | None
    header: ArtifactHeader | None
    parents: tuple[Ancestor, ...]
    measured: Mapping[str, str]
    reports: Mapping[str, Mapping[str, str]]
    next_commands: tuple[str, ...]
    notes: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """For `--json`: stable names, sizes in bytes."""
        header = self.header
        run = None if header is None or header.run is None else header.run.model_dump()
        return {
            "file": self.location,
            "kind": self.kind,
            "family": self.family,
            "recognised_by": self.recognised_by,
            "sha256": self.sha256,
            "file_sha256": self.file_sha256,
            "size_bytes": self.size_bytes,
            "number_formats": dict(self.number_formats),
            "latent_statistics": self.latent_statistics,
            "decoder": None if self.decoder is None else asdict(self.decoder),
            "encoder": None if self.encoder is None else asdict(self.encoder),
            "flashvaed": None if header is None else header.tool,
            "command": None if header is None else header.command_line or None,
            "seed": None if header is None else header.seed,
            "run": run,
            "lineage": [_ancestor_document(one) for one in self.parents],
            "measured": dict(self.measured),
            "reports": {name: dict(figures) for name, figures in self.reports.items()},
            "next": list(self.next_commands),
            "notes": list(self.notes),
        }


def gather(location: str, recipe: InfoRecipe, progress: Progress) -> FileFacts:
    """Load a file and describe it.

    Raises:
        ArtifactError: not found, not readable, or of a kind that flashvaed does not know.
    """
    path = locate(location, BUILTINS, may_download=recipe.allow_download or location.startswith("hf://"))
    if has_own_header(path) and (header := read_header(path)).kind == "analysis":
        return _of_analysis(location, path, header)
    checkpoint = load_input(location, recipe.family, progress, weights=recipe.weights)
    header = checkpoint.header
    files = checkpoint_files(path, recipe.weights)
    reports = find_reports(path, checkpoint.sha256)
    return FileFacts(
        location=location,
        kind=_kind(checkpoint),
        family=checkpoint.family,
        recognised_by=_recognised_by(checkpoint),
        sha256=checkpoint.sha256,
        file_sha256=sha256_of(path) if path.is_file() else None,
        size_bytes=sum(file.stat().st_size for file in files),
        number_formats=_number_formats(files),
        latent_statistics=bool(checkpoint.latent_mean and checkpoint.latent_std),
        decoder=_coder_facts(checkpoint.decoder, parse_bucket(recipe.size)),
        encoder=_coder_facts(checkpoint.encoder, None),
        header=header,
        parents=() if header is None else find_parents(header, str(path)),
        measured={} if header is None else measured_figures(header),
        reports=reports,
        next_commands=next_commands(location, header, checkpoint),
        notes=checkpoint.notes,
    )


def _of_analysis(location: str, path: Path, header: ArtifactHeader) -> FileFacts:
    return FileFacts(
        location=location,
        kind="analysis",
        family=header.family,
        recognised_by="its own header",
        sha256=content_sha256(path),
        file_sha256=sha256_of(path),
        size_bytes=path.stat().st_size,
        number_formats=_number_formats([path]),
        latent_statistics=True,
        decoder=None,
        encoder=None,
        header=header,
        parents=find_parents(header, str(path)),
        measured=measured_figures(header),
        reports={},
        next_commands=next_commands(location, header, None),
        notes=(),
    )


def _kind(checkpoint: Checkpoint) -> str:
    halves = [name for name in ("decoder", "encoder") if getattr(checkpoint, name) is not None]
    return "vae" if len(halves) == 2 else halves[0]


def _recognised_by(checkpoint: Checkpoint) -> str:
    if checkpoint.layout == ARTIFACT_LAYOUT:
        return "its own header"
    if checkpoint.layout == FLASH_CLASS:
        return f"{FLASH_CLASS} in config.json"
    certain = f", as {' and '.join(checkpoint.twins)} too" if checkpoint.twins else ""
    return f"names and shapes of its tensors: the layout {checkpoint.layout}{certain}"


def _number_formats(files: Sequence[Path]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for file in files:
        if file.suffix == ".safetensors":
            try:
                counts.update(str(entry.get("dtype", "?")) for entry in read_index(file).entries.values())
            except (FlashVaedError, OSError):
                continue
    return dict(counts.most_common())


def _coder_facts(coder: Decoder | Encoder | None, size: tuple[int, int, int] | None) -> CoderFacts | None:
    if coder is None:
        return None
    spec = coder.spec
    grid = (1, 1, 1)
    if size is not None:
        factor = spec.spatial_factor
        grid = (spec.num_latents(1 if spec.still else size[0]), -(-size[1] // factor), -(-size[2] // factor))
    costs = stage_costs(spec, grid)
    layers = [(stage_of(address), layer.operator) for address, layer in spec.layers()]
    stages = tuple(
        StageFacts(
            name=stage.name,
            widths=_widths(spec, stage.name),
            num_layers=sum(name == stage.name for name, _ in layers),
            operators=dict(Counter(operator for name, operator in layers if name == stage.name)),
            parameters=cost.parameters,
            gflop=0.0 if size is None else cost.flop / 1e9,
        )
        for stage, cost in zip(spec.stages, costs, strict=True)
    )
    return CoderFacts(
        parameters=coder.parameter_count,
        shape=light_shape(spec) if isinstance(spec, DecoderSpec) else None,
        latent_channels=coder.spec.latent_width,
        temporal_factor=spec.temporal_factor,
        spatial_factor=spec.spatial_factor,
        is_causal=spec.is_causal,
        whole_clips=_whole_clips(spec),
        is_still=spec.still,
        gflop=None if size is None else sum(cost.flop for cost in costs) / 1e9,
        stages=stages,
    )


def _whole_clips(spec: CoderSpec) -> str | None:
    if not spec.sees_whole_clip:
        return None
    if (tiles := spec.temporal_tiles) is None:
        return "sees whole clips: of any length, at once"
    shared = f", {tiles.overlap} shared with the next and blended" if tiles.overlap else ""
    return f"sees whole clips: of {tiles.length} latents{shared}; longer ones are cut so"


def _widths(spec: CoderSpec, stage: str) -> tuple[int, ...]:
    """Channels that enter the stage and that leave each block, equal neighbours once."""
    blocks = spec.stage(stage).blocks
    widths = [blocks[0].in_width, *(block.out_width for block in blocks)]
    return tuple(width for i, width in enumerate(widths) if i == 0 or width != widths[i - 1])


def _ancestor_document(ancestor: Ancestor) -> dict[str, Any]:
    header = ancestor.header
    return {
        **ancestor.lineage.model_dump(),
        "state": ancestor.state,
        "command": None if header is None else header.command_line or None,
        "started": None if header is None or header.run is None else header.run.started,
        "parents": [_ancestor_document(parent) for parent in ancestor.parents],
    }
