"""SOAP, Adam in the eigenbasis of the gradients: an optimizer that is gentle with weights solved in closed form.

Least-squares weights sit in a narrow valley: what their inputs share is fitted to many digits, and a step of
AdamW, equally long in every weight, leaves it at once. In the eigenbasis of the gradient's covariances, one per axis of
the weight, steep and flat directions are separate coordinates, each with its own scale.

Reference: Vyas et al., SOAP: Improving and Stabilizing Shampoo using Adam, arXiv 2409.11321. Departures: a kernel's
taps are one axis beside output and input channels; a coordinate moves by at most ten times the learning rate; groups
with `rotate_outputs=False` keep output channels apart, so that masked rows stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_LONGEST_STEP = 10.0
"""Longest step, in learning rates. A coordinate that first sees a gradient late would otherwise take a huge one."""

_BASIS_UPDATES_BY_DOUBLING = 8
"""Up to this step the bases are renewed at every power of two, because at first they rest on few gradients."""


class Soap(torch.optim.Optimizer):
    """Adam on rotated gradients. Vectors (biases, gammas) and axes that are too long are not rotated."""

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict],
        lr: float = 3e-4,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
        basis_decay: float = 0.95,
        basis_every_steps: int = 10,
        max_axis: int = 1024,
        weight_decay: float = 0.0,
    ) -> None:
        """Set up; a parameter's state begins with its first gradient.

        Args:
            betas: decay of the mean gradient, and of its square in the eigenbasis.
            basis_decay: decay of the gradients' covariances.
            basis_every_steps: steps between two renewals of the bases.
            max_axis: longest axis whose covariance is kept.
            weight_decay: fraction of a weight that a step of learning rate 1 would take away.
        """
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "basis_decay": basis_decay,
            "basis_every_steps": basis_every_steps,
            "max_axis": max_axis,
            "weight_decay": weight_decay,
            "rotate_outputs": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Step every parameter that has a gradient; a parameter's first step only initialises its bases."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)

    def _step_one(self, parameter: nn.Parameter, group: dict) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.reshape(axes_of(parameter))
        state = self.state[parameter]
        if not state:
            rotated = [gradient.ndim > 1 and size <= group["max_axis"] for size in gradient.shape]
            rotated[0] = rotated[0] and group["rotate_outputs"]
            state["step"] = 0
            state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
            state["covariances"] = [
                gradient.new_zeros(size, size) if turn else gradient.new_zeros(0)
                for size, turn in zip(gradient.shape, rotated, strict=True)
            ]
        _update_covariances(state["covariances"], gradient, group["basis_decay"])
        if "bases" not in state:
            state["bases"] = [_eigenbasis(covariance) for covariance in state["covariances"]]
            return
        state["step"] += 1
        step, (first, second) = state["step"], group["betas"]
        state["mean"].lerp_(gradient, 1 - first)
        turned = rotate(gradient, state["bases"])
        state["square"].mul_(second).addcmul_(turned, turned, value=1 - second)
        scale = (state["square"] / (1 - second**step)).sqrt_().add_(group["eps"])
        # not in place: an unrotated tensor is a view of the mean itself
        direction = rotate(state["mean"], state["bases"]) / (scale * (1 - first**step))
        direction = direction.clamp(-_LONGEST_STEP, _LONGEST_STEP)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(rotate(direction, state["bases"], back=True).reshape(parameter.shape), alpha=group["lr"])
        if step % group["basis_every_steps"] == 0 or (step < _BASIS_UPDATES_BY_DOUBLING and step & (step - 1) == 0):
            state["bases"] = [
                _renewed(basis, covariance)
                for basis, covariance in zip(state["bases"], state["covariances"], strict=True)
            ]


def axes_of(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the parameter as outputs, inputs (if there is more than one) and taps."""
    if parameter.ndim < 3:
        return tuple(parameter.shape)
    taps = parameter[0, 0].numel()
    return (parameter.shape[0], taps) if parameter.shape[1] == 1 else (parameter.shape[0], parameter.shape[1], taps)


def rotate(x: Tensor, bases: list[Tensor], *, back: bool = False) -> Tensor:
    """Into the bases of all axes (columns are basis vectors), or back; an empty basis leaves its axis as it is."""
    for basis in bases:  # each round moves the first axis to the end, so the final order is the original one
        x = x.movedim(0, -1)
        if basis.numel():
            x = x @ (basis.T if back else basis)
    return x


def _update_covariances(covariances: list[Tensor], gradient: Tensor, decay: float) -> None:
    for axis, covariance in enumerate(covariances):
        if covariance.numel():
            rows = gradient.movedim(axis, 0).flatten(1)
            covariance.lerp_(rows @ rows.T, 1 - decay)


def _eigenbasis(covariance: Tensor) -> Tensor:
    """Columns from the largest eigenvalue down: the order that `_renewed` keeps."""
    return torch.linalg.eigh(covariance)[1].flip(1) if covariance.numel() else covariance


def _renewed(basis: Tensor, covariance: Tensor) -> Tensor:
    """One step of power iteration: close to the eigenbasis, with the columns in order.

    Columns do not change places, so that each keeps its running squares.
    """
    return torch.linalg.qr(covariance @ basis)[0] if basis.numel() else basis
