"""An evaluation whose decoders run out of memory goes on in smaller steps, which it says."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TypeVar

from flashvaed_cli.decoders.run.less_memory import described, in_steps, release_memory, smaller_steps
from flashvaed_cli.decoders.run.runtime import DecodeRuntime
from flashvaed_cli.errors import is_out_of_memory
from flashvaed_cli.progress import Progress
from flashvaed_cli.recipe.evaluate import EvalRecipe
from flashvaed_cli.stages.evaluate.judge import FeatureJudge

ResultT = TypeVar("ResultT")


class SteppingDown:
    """The decoders and settings of an evaluation, with steps that get smaller as memory runs out.

    Attributes:
        notes: what became smaller.
    """

    def __init__(self, runtimes: Mapping[str, DecodeRuntime], recipe: EvalRecipe, progress: Progress) -> None:
        self.runtimes, self.recipe = dict(runtimes), recipe
        self.notes: list[str] = []
        self._progress = progress

    def run(
        self,
        work: Callable[..., ResultT],
        *,
        chunk: int,
        features: FeatureJudge | None = None,
    ) -> ResultT:
        """What `work` returns; from its beginning where memory runs out.

        Args:
            work: takes `runtimes` and `recipe`.
            chunk: latent frames per step where nothing settles them.
            features: what `work` adds to.
        Raises:
            As `work`; its own error where memory runs out in the smallest steps too.
        """
        while True:
            before = None if features is None else copy.deepcopy(features.statistics)
            try:
                return work(runtimes=self.runtimes, recipe=self.recipe)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                specs = [runtime.spec for runtime in self.runtimes.values()]
                steps = smaller_steps(specs, self.recipe.chunk or chunk, self.recipe.tile, None)
                if steps is None:
                    raise
            if features is not None and before is not None:
                features.statistics = before
                features.end_clip()
            self.recipe = self.recipe.model_copy(update={"chunk": steps[0], "tile": steps[1], "max_memory": None})
            self.runtimes = {name: in_steps(runtime, steps) for name, runtime in self.runtimes.items()}
            release_memory(next(iter(self.runtimes.values())).device)
            self.notes.append(f"out of memory: decoded with {described(steps)}")
            self._progress.warn(f"out of memory: decoding again with {described(steps)}")
