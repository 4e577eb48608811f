"""A part of the original paired with its successor in the new decoder: what every solver works on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from jaxtyping import Float
from torch import Tensor, nn

from flashvaed_cli.surgery.activations import ActivationStore
from flashvaed_cli.surgery.layer_fit import FitSettings
from flashvaed_cli.surgery.recording import RecordedRows
from flashvaed_cli.surgery.transfer import Channels

PartT_co = TypeVar("PartT_co", bound=nn.Module, covariant=True)
Clip = Float[Tensor, "_B _C _T _H _W"]

_ROWS = "rows"


class Entering(NamedTuple):
    """Names in the store of what enters a part: in the original, and in the new decoder."""

    reference: str
    student: str


@dataclass(frozen=True)
class Pair(Generic[PartT_co]):
    """A block of the original and its successor, or the bypasses of a stage in both.

    Attributes:
        address: of the block; of a bypass, that of the block whose output it is added to.
        before, inner, after: kept channels that enter the part, those of the tensors inside it, and those that leave.
        entering: where the store holds the inputs of both.
    """

    address: str
    reference: PartT_co
    student: PartT_co
    before: Channels
    after: Channels
    settings: FitSettings
    store: ActivationStore
    num_clips: int
    entering: Entering
    inner: Mapping[str, Channels] = field(default_factory=dict)

    def inputs(self, clip: int) -> tuple[Clip, Clip]:
        """The inputs of the part in a clip, in the original and in the new decoder."""
        return self.store.load_input(clip, self.entering.reference), self.store.load_input(clip, self.entering.student)

    def rows(self, clip: int) -> RecordedRows:
        """Inputs and outputs of the original's block at this address in a clip, at the sampled positions."""
        return RecordedRows.from_tensors(self.store.load(clip, _ROWS))

    def save_rows(self, clip: int, rows: RecordedRows) -> None:
        """Keep the rows of a clip; those of the block before are replaced."""
        self.store.save(clip, _ROWS, rows.to_tensors())

    def clips(self) -> Iterator[tuple[Clip, RecordedRows]]:
        """For every clip, what enters the part in the new decoder, and the original's rows."""
        for clip in range(self.num_clips):
            yield self.store.load_input(clip, self.entering.student), self.rows(clip)
