"""What a phase minimises: the terms that it computes, on one micro-batch, weighted and summed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.modules.operators import frames_as_batch
from flashvaed_cli.decoders.run.runtime import require_compiler
from flashvaed_cli.decoders.variants.exact import exact_decoder
from flashvaed_cli.distill.adversary import Adversary
from flashvaed_cli.distill.features import FeatureMatcher, run_with_features
from flashvaed_cli.distill.losses import FRAME_LOSSES, LossWeights, clamped_error, r2_loss
from flashvaed_cli.distill.phases import PhasePlan
from flashvaed_cli.distill.ranks import Ranks
from flashvaed_cli.distill.settings import TrainSettings
from flashvaed_cli.errors import DistillationError

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""Perceptual distance of two sets of images `[N, 3, H, W]` in about [-1, 1]; its mean is taken."""


@dataclass(frozen=True)
class Objective:
    """The loss of a phase as a function of the student's weights.

    Attributes:
        student, teacher: views with exact operators that share their weights with the decoders given: the same
            frames within rounding and the same gradients, in about half the time on a CPU.
        active: the loss terms to compute.
        absent: terms with a weight that cannot be computed.
        adversary: what the adversarial term is measured by; it learns in the same call.
    """

    student: Decoder
    teacher: Decoder
    plan: PhasePlan
    matcher: FeatureMatcher
    settings: TrainSettings
    active: tuple[str, ...]
    absent: tuple[str, ...]
    perceptual: Perceptual | None
    ranks: Ranks
    adversary: Adversary | None = None

    def __call__(
        self, latents: Float[Tensor, "B C T Hz Wz"], *, step: int = 0, share: float = 1.0
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss of one micro-batch, and the values to log: `loss`, the unweighted terms, `clamped_error`.

        Args:
            step: of the phase.
            share: of the micro-batch in the step's mean.
        """
        frames, target, terms, error = self.terms(latents)
        seen: dict[str, Tensor] = {}
        if self.adversary is not None:
            begun = self.adversary.has_begun(step)
            terms["adversarial"] = self.adversary.term(frames) if begun else frames.sum() * 0
            seen["discriminator"] = self.adversary.learn(frames, target, share=share) if begun else error.new_zeros(())
        weighted = [getattr(self.settings.loss_weights, name) * term for name, term in terms.items()]
        loss = torch.stack(weighted).sum()
        return loss, {"loss": loss, **terms, **seen, "clamped_error": error}

    def terms(self, latents: Float[Tensor, "B C T Hz Wz"]) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
        """The student's frames and the teacher's, the unweighted terms, and the error of clamped frames, for the PSNR.

        The adversarial term, which has state, is not included.
        """
        if self.settings.channels_last:
            latents = latents.contiguous(memory_format=torch.channels_last_3d)
        matched = self.matcher.addresses if "feature" in self.active else ()
        watched = {*matched, *(self.plan.to_keep if "l_ce" in self.active else ())}
        half = self.settings.compute_dtype == "bfloat16"
        with torch.autocast(latents.device.type, dtype=torch.bfloat16, enabled=half):
            with torch.no_grad():
                target, target_features = run_with_features(self.teacher, latents, matched)
            recompute = self.settings.checkpoint_activations
            frames, features = run_with_features(self.student, latents, watched, recompute=recompute)
        frames, target = frames.float(), target.float()
        terms = {name: loss(frames, target) for name, loss in FRAME_LOSSES.items() if name in self.active}
        if "lpips" in self.active:
            assert self.perceptual is not None
            terms["lpips"] = self.perceptual(frames_as_batch(frames), frames_as_batch(target)).mean()
        if "feature" in self.active:
            terms["feature"] = self.matcher(features, target_features)
        if "l_ce" in self.active:
            terms["l_ce"] = torch.stack([self._l_ce(features[a], kept) for a, kept in self.plan.to_keep.items()]).mean()
        return frames, target, terms, clamped_error(frames, target)

    def _l_ce(self, features: Float[Tensor, "B C T H W"], kept: tuple[int, ...]) -> Float[Tensor, ""]:
        """Over the clips of all ranks together; over successive micro-batches it is the mean."""
        return r2_loss(features.float(), kept, mean_over_ranks=self.ranks.mean if self.ranks.count > 1 else None)


def prepare_objective(
    student: Decoder,
    teacher: Decoder,
    plan: PhasePlan,
    matcher: FeatureMatcher,
    settings: TrainSettings,
    *,
    perceptual: Perceptual | None,
    ranks: Ranks,
    adversary: Adversary | None = None,
) -> Objective:
    """Choose the terms, and the operators to compute them with.

    Raises:
        DistillationError: no term is left.
        DecodeError: `compile` is set and this machine has no compiler for it.
    """
    active, absent = choose_terms(settings.loss_weights, plan, perceptual)
    device = next(student.parameters()).device
    # Winograd's transforms do not survive autocast: with it, the operators for a GPU, which spare products only.
    device_type = "cuda" if settings.compute_dtype == "bfloat16" else device.type
    views = [exact_decoder(decoder, device_type=device_type) for decoder in (student, teacher)]
    if settings.compile:
        require_compiler(device)
        for view in views:
            for _, block in view.blocks():
                block.compile()
    return Objective(views[0], views[1], plan, matcher, settings, active, absent, perceptual, ranks, adversary)


def choose_terms(
    weights: LossWeights, plan: PhasePlan, perceptual: Perceptual | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The terms that a phase computes, and those with a weight that it cannot.

    L_ce belongs to phase 2, so its absence from the others does not count as missing.
    """
    possible = {
        **dict.fromkeys(FRAME_LOSSES, True),
        "lpips": perceptual is not None,
        "feature": bool(plan.matches),
        "l_ce": bool(plan.to_keep),
        "adversarial": True,
    }
    wanted = [name for name in possible if getattr(weights, name) > 0 and (name != "l_ce" or plan.number == 2)]
    active = tuple(name for name in wanted if possible[name])
    if not active:
        raise DistillationError("Every loss term is switched off or cannot be computed: give l1 a weight.")
    return active, tuple(name for name in wanted if not possible[name])
