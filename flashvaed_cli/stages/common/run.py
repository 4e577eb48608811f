"""How every stage begins and ends: one check of the output, one way to load the input and its original, one header.

A stage opens its `Run`, returns `run.finished` if an earlier run made the result already, calls `run.load()`, works,
and writes with `run.header(...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar

import torch

from flashvaed_cli.artifact.checkpoint import Checkpoint, derived_header
from flashvaed_cli.artifact.header import ArtifactHeader, Lineage
from flashvaed_cli.artifact.measured import Record
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.settings import StageRecipe
from flashvaed_cli.stages.common.loading import (
    Inputs,
    choose_device,
    choose_input,
    input_settings,
    load_input,
    load_inputs,
    with_plain_operators,
)
from flashvaed_cli.stages.common.outputs import claim_file, claim_folder
from flashvaed_cli.stages.common.result import StageOutcome
from flashvaed_cli.stages.common.run_watch import RunWatch
from flashvaed_cli.stages.common.up_to_date import finished_artifact

RecipeT = TypeVar("RecipeT", bound=StageRecipe)
ResultT = TypeVar("ResultT")


class MainFirst(Protocol):
    """Calls a function in the main process and passes its result, or error, to all; see `Ranks.from_main`."""

    def __call__(self, function: Callable[[], ResultT], /) -> ResultT: ...


def _here(function: Callable[[], ResultT], /) -> ResultT:
    return function()


@dataclass(frozen=True)
class Run(Generic[RecipeT]):
    """One run of a stage.

    Attributes:
        recipe: its settings.
        location: of the input, given or chosen.
        output: the file or folder that it may write.
        finished: the outcome of an earlier run with the same settings on the same files, if it is still valid.
        command_line: as typed.
        watch: started with the run.
    """

    recipe: RecipeT
    location: str
    output: Path
    progress: Progress
    force: bool
    command_line: str
    watch: RunWatch
    finished: StageOutcome | None = None

    @classmethod
    def open(
        cls,
        recipe: RecipeT,
        *,
        progress: Progress,
        force: bool,
        command_line: str,
        reads: Sequence[str | None] = (),
        beside: Iterable[Path] = (),
        data: Callable[[], Iterable[Path]],
    ) -> Run[RecipeT]:
        """The run of a command that writes one artifact.

        Args:
            reads: files that it reads besides its input and the original.
            beside: what it writes besides its output; see `claim_file`.
            data: finds the recipe's clips.
        Raises:
            FlashVaedError: no place to write to; or a file of another program, the input itself, or a finished result
                of other settings is there and `force` is not set.
        """
        watch = RunWatch()
        location = choose_input(recipe.input, type(recipe), progress)
        read = (location, recipe.original, *reads)
        output = claim_file(recipe.output, force=force, reads=read, beside=beside)
        run = cls(recipe, location, output, progress, force, command_line, watch)
        return replace(run, finished=finished_artifact(output, recipe, location, data, force=force))

    @classmethod
    def open_folder(
        cls,
        recipe: RecipeT,
        *markers: str,
        progress: Progress,
        force: bool,
        command_line: str,
        from_main: MainFirst = _here,
    ) -> Run[RecipeT]:
        """The run of a command that fills a folder; one of `markers` in it shows that this program wrote it.

        Raises:
            FlashVaedError: no place to write to, or the folder holds files of something else and `force` is not set.
        """
        watch = RunWatch()
        output = from_main(lambda: claim_folder(recipe.output, *markers, force=force))
        location = choose_input(recipe.input, type(recipe), progress)
        return cls(recipe, location, output, progress, force, command_line, watch)

    @property
    def device(self) -> torch.device:
        """The device to compute on.

        Raises:
            FlashVaedError: this machine does not have what the recipe names.
        """
        return choose_device(self.recipe.device)

    def load(self, device: torch.device | None = None) -> Inputs:
        """The input and its original on the device, with plain operators.

        Raises:
            ArtifactError: not found, unreadable, or not the original of the input.
        """
        settings = input_settings(self.recipe)
        return load_inputs(self.location, **settings, device=device or self.device, progress=self.progress)

    def load_alone(self) -> Checkpoint:
        """The input without its original, with plain operators, on the CPU.

        Raises:
            ArtifactError: not found or unreadable.
        """
        recipe = self.recipe
        settings = {"weights": recipe.weights, "original": recipe.original}
        return with_plain_operators(load_input(self.location, recipe.family, self.progress, **settings))

    def header(
        self,
        inputs: Inputs,
        measured: Record,
        *,
        kind: Literal["decoder", "analysis"] = "decoder",
        kept_channels: Mapping[str, Sequence[int]] | None = None,
        parents: Sequence[Lineage] = (),
        files: Sequence[Path] = (),
        speedup: float | None = None,
    ) -> ArtifactHeader:
        """The header of what the run made: call it when the artifact is about to be written.

        Args:
            kept_channels, parents: see `derived_header`.
            files: the clips and latents that were read.
            speedup: measured.
        """
        return derived_header(
            inputs.checkpoint,
            kind=kind,
            recipe=self.recipe.model_dump(mode="json"),
            command_line=self.command_line,
            seed=self.recipe.seed,
            kept_channels=kept_channels,
            parents=parents,
            measured=measured.as_json(),
            run=self.watch.record(inputs.device, files, speedup=speedup),
        )
