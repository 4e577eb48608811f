"""Train a small VAE from scratch: a loop bounded by wall clock, resumable after a SIGKILL.

The schedule follows elapsed time, not steps: the learning rate reaches zero at the end of the budget
however busy the machine is. Single images take a 2D path with the same weights, a third of the cost.

Reference: Wan 2.1 VAE (topology); Muon, https://kellerjordan.github.io/posts/muon (orthogonalised momentum).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from flashvaed_cli.decoders.modules.coder import Coder, Decoder, Encoder
from flashvaed_cli.decoders.modules.norms import NORM_EPS, ChannelRMSNorm
from flashvaed_cli.decoders.spec.coders import CoderSpec
from flashvaed_cli.decoders.spec.layers import ConvSpec
from flashvaed_cli.errors import DistillationError

Log = Callable[[str], None]
Pixels = Float[Tensor, "B C T H W"]

_MIN_SAMPLE_MSE = 1e-4  # flattens the loss of a sample above 46 dB
_ORTHOGONALISATION = (3.4445, -4.7750, 2.0315)  # quintic Newton-Schulz, fast from small singular values


class BatchSource(Protocol):
    """Where batches come from."""

    def draw(self, progress: float, rng: torch.Generator) -> Pixels:
        """A batch in [-1, 1] for this part of the schedule; all its randomness comes from `rng`."""
        ...


@dataclass(frozen=True)
class TrainingPlan:
    """What a run is made of.

    Attributes:
        budget_s: wall clock of training, over all resumptions.
        matrix_lr: step of the convolution kernels, as a fraction of an orthogonal matrix.
        vector_lr: AdamW rate of biases, norms, and the first and last layers.
        warmup_frac: share of the budget until the full rate.
        flat_frac: share of the budget after which the rate falls linearly to zero.
        kl_from: share of the budget after which latents are sampled and the KL term counts.
        max_steps: stop earlier; for tests.
    """

    budget_s: float
    matrix_lr: float = 6e-5
    vector_lr: float = 3e-5
    momentum: float = 0.95
    warmup_frac: float = 0.05
    flat_frac: float = 0.3
    ema_decay: float = 0.998
    kl_weight: float = 1e-5
    kl_from: float = 0.85
    checkpoint_every_s: float = 120.0
    log_every_s: float = 30.0
    autocast: bool = True
    seed: int = 0
    max_steps: int | None = None


class Autoencoder(nn.Module):
    """Encoder and decoder in one module: pixels to reconstruction, mean and log-variance."""

    def __init__(self, encoder: Coder, decoder: Coder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, pixels: Pixels, noise_scale: float = 0.0) -> tuple[Pixels, Tensor, Tensor]:
        mean, log_variance = self.encoder(pixels).chunk(2, dim=1)
        latents = mean
        if noise_scale > 0:
            latents = mean + noise_scale * (0.5 * log_variance.clamp(-30, 10)).exp() * torch.randn_like(mean)
        return self.decoder(latents), mean, log_variance


class ImagePath:
    """Runs single images: at T = 1 a causal kernel is its last temporal slice, a 2D kernel."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self._full = autoencoder
        self._flat = Autoencoder(
            Coder(_image_spec(autoencoder.encoder.spec)), Coder(_image_spec(autoencoder.decoder.spec))
        )
        self._shapes = {name: p.shape for name, p in self._flat.named_parameters()}

    def __call__(self, images: Pixels, noise_scale: float = 0.0) -> tuple[Pixels, Tensor, Tensor]:
        weights = {
            name: p if p.shape == self._shapes[name] else p[:, :, -1] for name, p in self._full.named_parameters()
        }
        return functional_call(self._flat, weights, (images, noise_scale))


def _image_spec(spec: CoderSpec) -> CoderSpec:
    """The spec with every causal convolution that images pass replaced by its last temporal tap."""

    def flatten(value: Any) -> Any:
        if isinstance(value, ConvSpec):
            if value.operator != "causal3d" or value.kernel[1:] == (1, 1):
                return value  # the layers that change the number of frames: an image skips them
            return value.model_copy(update={"operator": "frame2d", "kernel": (1, *value.kernel[1:])})
        fields = {name: getattr(value, name) for name in type(value).model_fields}
        return value.model_copy(update={k: flatten(v) for k, v in fields.items() if isinstance(v, ConvSpec)})

    return spec.with_blocks({address: flatten(block) for address, block in spec.blocks()})


class _UnitNorm(torch.autograd.Function):
    """`x / |x|` over channels, times `gain`, with a backward of few passes (training is memory-bound here)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        inverse = (x * x).sum(1, keepdim=True).clamp_min_(NORM_EPS**2).rsqrt_()
        unit = x * inverse
        ctx.save_for_backward(unit, inverse, gain)
        return unit * gain

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        unit, inverse, gain = ctx.saved_tensors
        grad_gain = (grads[0] * unit).transpose(0, 1).flatten(1).sum(1).view_as(gain)
        grad = grads[0] * gain
        along = (grad * unit).sum(1, keepdim=True)
        return grad.addcmul_(unit, along, value=-1).mul_(inverse), grad_gain


def _fast_norm(self: ChannelRMSNorm, x: Tensor) -> Tensor:
    gamma = self.get_parameter("gamma")
    gain = (gamma * gamma.shape[0] ** 0.5).view(1, -1, *([1] * (x.ndim - 2)))
    return _UnitNorm.apply(x, gain.to(x.dtype))  # type: ignore[no-any-return]


@contextmanager
def fast_norms() -> Iterator[None]:
    """Within this block every ChannelRMSNorm runs the training version of its forward."""
    original = ChannelRMSNorm.forward
    ChannelRMSNorm.forward = _fast_norm  # type: ignore[method-assign]
    try:
        yield
    finally:
        ChannelRMSNorm.forward = original  # type: ignore[method-assign]


class OrthogonalMomentum(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose update is the nearest orthogonal matrix; kernels count as `[O, C*k]`."""

    def __init__(self, params: Iterable[nn.Parameter], *, lr: float, momentum: float) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                update = orthogonalise(update) * max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                p.add_(update.view_as(p), alpha=-group["lr"])


def orthogonalise(matrix: Float[Tensor, "O K"], num_iterations: int = 5) -> Float[Tensor, "O K"]:
    """About the nearest matrix with all singular values 1 (Newton-Schulz leaves them in 0.7 to 1.2)."""
    a, b, c = _ORTHOGONALISATION
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix) / (matrix.norm() + 1e-12)
    for _ in range(num_iterations):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def build_optimizers(autoencoder: Autoencoder, plan: TrainingPlan) -> list[torch.optim.Optimizer]:
    """Orthogonalised momentum for kernels between hidden widths; AdamW for all else."""
    matrices, vectors = [], []
    for p in autoencoder.parameters():
        hidden = p.ndim >= 2 and min(p.shape[0], p[0].numel()) >= 8
        (matrices if hidden else vectors).append(p)
    return [
        OrthogonalMomentum(matrices, lr=plan.matrix_lr, momentum=plan.momentum),
        torch.optim.AdamW(vectors, lr=plan.vector_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_at(progress: float, plan: TrainingPlan) -> float:
    """Factor of the learning rates: linear warm-up, flat, linear fall to zero."""
    warm = min(1.0, (progress + 1e-3) / plan.warmup_frac)
    return warm * min(1.0, max(0.0, 1.0 - progress) / (1.0 - plan.flat_frac))


def reconstruction_loss(output: Pixels, pixels: Pixels) -> Float[Tensor, ""]:
    """Mean over samples of the root mean square error: between MSE and PSNR in how it weighs easy samples."""
    mse = (output.float() - pixels).square().flatten(1).mean(1)
    return (mse + _MIN_SAMPLE_MSE).sqrt().mean()


def kl_loss(mean: Tensor, log_variance: Tensor) -> Float[Tensor, ""]:
    """KL of the posterior to the unit normal, mean over latent elements."""
    mean, log_variance = mean.float(), log_variance.float().clamp(-30, 10)
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


@dataclass
class RunState:
    """All that a resumed run needs to go on as if nothing had happened."""

    autoencoder: Autoencoder
    optimizers: list[torch.optim.Optimizer]
    ema: dict[str, Tensor]
    rng: torch.Generator
    step: int = 0
    elapsed_s: float = 0.0

    def save(self, path: Path) -> None:
        """Write everything beside `path`, then rename."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
        torch.save(
            {
                "model": self.autoencoder.state_dict(),
                "optimizers": [o.state_dict() for o in self.optimizers],
                "ema": self.ema,
                "rng": self.rng.get_state(),
                "noise_rng": torch.get_rng_state(),
                "step": self.step,
                "elapsed_s": self.elapsed_s,
            },
            temporary,
        )
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Take over a saved run. Raises DistillationError where it belongs to another model."""
        saved = torch.load(path, weights_only=True)
        try:
            self.autoencoder.load_state_dict(saved["model"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError) as error:
            raise DistillationError(
                f"{path} does not continue this run ({error}). Name another --work-dir, or delete it."
            ) from error
        self.ema = saved["ema"]
        self.rng.set_state(saved["rng"])
        torch.set_rng_state(saved["noise_rng"])
        self.step, self.elapsed_s = saved["step"], saved["elapsed_s"]


def start_state(encoder: Encoder, decoder: Decoder, plan: TrainingPlan) -> RunState:
    """A run at its first step."""
    torch.manual_seed(plan.seed)
    autoencoder = Autoencoder(encoder, decoder)
    ema = {name: value.detach().clone() for name, value in autoencoder.state_dict().items()}
    rng = torch.Generator().manual_seed(plan.seed)
    return RunState(autoencoder, build_optimizers(autoencoder, plan), ema, rng)


def train(
    state: RunState,
    batches: BatchSource,
    plan: TrainingPlan,
    *,
    checkpoint: Path,
    log: Log = print,
    on_checkpoint: Callable[[RunState], None] | None = None,
) -> RunState:
    """Train until the budget is spent; a checkpoint that exists is continued.

    Args:
        state: a fresh run from `start_state`; overwritten by `checkpoint` where that exists.
        checkpoint: written about every `plan.checkpoint_every_s` seconds and at the end.
        on_checkpoint: called after each; its time does not count against the budget of a resumed run.
    Returns:
        The state, with the averaged weights in `ema`.
    Raises:
        DistillationError: the checkpoint belongs to another model, or the loss is no longer finite.
    """
    images = ImagePath(state.autoencoder)  # draws random numbers: before `load` sets their state
    if checkpoint.exists():
        state.load(checkpoint)
        log(f"resumed at step {state.step}, {state.elapsed_s:.0f} s of {plan.budget_s:.0f} s")
    initial_lr = [group["lr"] for o in build_optimizers(state.autoencoder, plan) for group in o.param_groups]
    start = time.monotonic() - state.elapsed_s
    next_log, next_save = state.elapsed_s, state.elapsed_s + plan.checkpoint_every_s
    losses: dict[int, list[float]] = {}
    with fast_norms():
        while state.elapsed_s < plan.budget_s and (plan.max_steps is None or state.step < plan.max_steps):
            progress = state.elapsed_s / plan.budget_s
            pixels = batches.draw(progress, state.rng)
            loss = _step(state, images, pixels, plan, progress, initial_lr)
            losses.setdefault(pixels.shape[2], []).append(loss)
            state.elapsed_s = time.monotonic() - start
            if state.elapsed_s >= next_log:
                log(_log_line(state, plan, losses))
                losses.clear()
                next_log = state.elapsed_s + plan.log_every_s
            if state.elapsed_s >= next_save:
                state.save(checkpoint)
                if on_checkpoint is not None:
                    on_checkpoint(state)
                next_save = time.monotonic() - start + plan.checkpoint_every_s
    state.save(checkpoint)
    return state


def _step(
    state: RunState, images: ImagePath, pixels: Pixels, plan: TrainingPlan, progress: float, initial_lr: list[float]
) -> float:
    """One update of the weights and of their average; returns the reconstruction loss."""
    groups = [group for o in state.optimizers for group in o.param_groups]
    for group, lr in zip(groups, initial_lr, strict=True):
        group["lr"] = lr * rate_at(progress, plan)
    sampled = progress >= plan.kl_from
    forward = images if pixels.shape[2] == 1 else state.autoencoder
    with torch.autocast("cpu", torch.bfloat16, enabled=plan.autocast):
        output, mean, log_variance = forward(pixels, noise_scale=1.0 if sampled else 0.0)
    loss = reconstruction_loss(output, pixels)
    total = loss + plan.kl_weight * kl_loss(mean, log_variance) if sampled else loss
    total.backward()
    if not torch.isfinite(loss):
        raise DistillationError(f"The loss is {loss.item()} at step {state.step}: lower the learning rates.")
    for optimizer in state.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    state.step += 1
    decay = min(plan.ema_decay, state.step / (state.step + 10))
    with torch.no_grad():
        for name, value in state.autoencoder.state_dict().items():
            state.ema[name].lerp_(value, 1 - decay)
    return loss.item()


def _log_line(state: RunState, plan: TrainingPlan, losses: dict[int, list[float]]) -> str:
    """`psnr_db` here is that of the mean root mean square error of the last training batches."""
    parts = [
        f"T={frames}: {6.0206 - 20 * torch.tensor(values).mean().log10().item():.2f} dB ({len(values)})"
        for frames, values in sorted(losses.items())
    ]
    rate = rate_at(state.elapsed_s / plan.budget_s, plan)
    return f"{state.elapsed_s:6.0f} s  step {state.step}  rate {rate:.3f}  train {'  '.join(parts)}"
