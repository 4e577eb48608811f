"""Averages that training keeps: of the weights (EMA) and of the loss terms between two log entries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Exponential moving average of parameters, by name.

    The decay rises as (1 + n) / (10 + n) up to its value, so that a short run is not the average of its start.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.values = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take one more step into the average."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        for name, value in self.values.items():
            value.lerp_(parameters[name], 1 - decay)

    @torch.no_grad()
    def copy_to(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Write the averages into the parameters."""
        for name, value in self.values.items():
            parameters[name].copy_(value)

    @contextmanager
    def in_place_of(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Within the block, the parameters are their averages."""
        before = {name: parameters[name].detach().clone() for name in self.values}
        self.copy_to(parameters)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    parameters[name].copy_(value)

    def state_dict(self) -> dict[str, object]:
        """Everything that a resumption needs."""
        return {"num_updates": self.num_updates, "values": self.values}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` gave."""
        self.num_updates = state["num_updates"]
        for name, value in self.values.items():
            value.copy_(state["values"][name])


class TermAverage:
    """Means of named scalars since the last `take`; waits for no device until then."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count the values of one step."""
        self.count += 1
        for name, value in values.items():
            value = value.detach().double() if value.device.type != "mps" else value.detach().cpu().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def take(self) -> dict[str, float]:
        """The means; then start over."""
        means = {name: float(total) / self.count for name, total in self.sums.items()}
        self.count, self.sums = 0, {}
        return means

    def state_dict(self) -> dict[str, object]:
        """Everything that a resumption needs."""
        return {"count": self.count, "sums": self.sums}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Restore what `state_dict` gave."""
        place = torch.device("cpu") if device.type == "mps" else device
        self.count = state["count"]
        self.sums = {name: value.to(place) for name, value in state["sums"].items()}
