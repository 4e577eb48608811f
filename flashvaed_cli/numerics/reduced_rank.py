"""Least squares for a layer of limited rank: the best of all such layers, in closed form."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from flashvaed_cli.numerics.accumulation import plain_arithmetic
from flashvaed_cli.numerics.least_squares import NormalEquations, damping_energy, solve_ridge


def factorise(
    weight: Float[Tensor, "O K"], rank: int, gram: Float[Tensor, "K K"] | None = None
) -> tuple[Float64[Tensor, "O r"], Float64[Tensor, "r K"]]:
    """The rank-r product nearest to a weight: minimises tr((W - A B) G (W - A B)ᵀ), G = `gram` or the identity.

    A holds the r leading eigenvectors of W G Wᵀ, B = Aᵀ W: Eckart and Young's theorem for W G^(1/2).

    Raises:
        ValueError: `rank` is not in 1 ... min(O, K).
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} has no factors of rank {rank}")
    exact = weight.detach().double()
    metric = exact if gram is None else exact @ gram.to(exact)
    second = metric @ exact.T  # [O, O]
    leading = torch.linalg.eigh((second + second.T) / 2).eigenvectors[:, -rank:].flip(1)
    return leading, leading.T @ exact


def solve_reduced_rank(
    equations: NormalEquations, rank: int, *, dampening_frac: float, prior_weight: Float[Tensor, "O K"] | None = None
) -> tuple[Float64[Tensor, "O r"], Float64[Tensor, "r K"], Float64[Tensor, " O"]]:
    """The two factors and the bias of a layer of rank r by ridge least squares.

    The objective of `solve_ridge` is a quadratic form around its solution W with the damped gram G, so its minimum
    over all weights of rank r is W projected on the leading eigenvectors of W G Wᵀ: exact, no iteration.

    Args:
        rank: 1 ... min(O, K).
        dampening_frac, prior_weight: as in `solve_ridge`; the prior may have any rank.
    Raises:
        CalibrationError: the damped gram is not positive definite.
        ValueError: no such rank.
    Reference:
        Izenman 1975, Reduced-rank regression for the multivariate linear model. Departure: ridge term and prior.
    """
    full = solve_ridge(equations, dampening_frac=dampening_frac, prior_weight=prior_weight)
    with plain_arithmetic(full.weight.device):
        damped = equations.gram.clone()
        damped.diagonal().add_(damping_energy(equations), alpha=dampening_frac)
        outer, inner = factorise(full.weight, rank, damped)
        bias = equations.target_mean - outer @ (inner @ equations.feature_mean)
    return outer, inner, bias
