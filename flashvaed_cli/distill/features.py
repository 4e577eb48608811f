"""Run a decoder and collect tensors inside it; compare the student's with the teacher's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.distill.phases import FeatureMatch

Features = dict[str, Tensor]


def run_with_features(
    decoder: Decoder, latents: Float[Tensor, "B C T Hz Wz"], addresses: Collection[str], *, recompute: bool = False
) -> tuple[Float[Tensor, "B 3 F H W"], Features]:
    """Decode a whole clip and keep the outputs of the named blocks (`up2.0`) and layers (`up2.0.conv1`).

    Args:
        recompute: keep no activations inside a block; the backward pass runs it again.
    Returns:
        The frames, not clamped, and the tensors by address.
    """
    features: Features = {}
    layers = [address for address in addresses if address.count(".") > 1]
    x = latents
    with _layer_outputs(decoder, layers, features):
        for address, x in decoder.walk(latents, call=_recomputed if recompute else None):
            if address in addresses:
                features[address] = x
    return decoder.leave(x), features


def _recomputed(block: nn.Module, *inputs: object) -> Tensor:
    output = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(output, Tensor)
    return output


@contextmanager
def _layer_outputs(decoder: Decoder, addresses: Sequence[str], features: Features) -> Iterator[None]:
    """Tensors inside a block can only be reached by hooks."""

    def keeper(address: str) -> Callable[[nn.Module, object, Tensor], None]:
        def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            # Without gradients the block may overwrite the tensor with its activation.
            features[address] = output if torch.is_grad_enabled() else output.clone()

        return keep

    handles = [decoder.at(address).register_forward_hook(keeper(address)) for address in addresses]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _ChannelMap(nn.Module):
    """A trainable 1x1 projection from the student's kept channels to all of the teacher's."""

    def __init__(self, weight: Float[Tensor, "C K"], bias: Float[Tensor, " C"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().float().clone())
        self.bias = nn.Parameter(bias.detach().float().clone())

    def forward(self, x: Float[Tensor, "B K T H W"]) -> Float[Tensor, "B C T H W"]:
        return F.conv3d(x, self.weight[:, :, None, None, None], self.bias)


class FeatureMatcher(nn.Module):
    """Mean absolute difference of matched tensors. Holds the projections, which are discarded after training."""

    def __init__(self, matches: Sequence[FeatureMatch]) -> None:
        super().__init__()
        self.matches = tuple(matches)
        self.projections = nn.ModuleDict(
            {_key(m.address): _ChannelMap(*m.projection) for m in matches if m.projection is not None}
        )

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where the tensors come from, in the order of the matches."""
        return tuple(match.address for match in self.matches)

    def distance(self, match: FeatureMatch, student: Tensor, teacher: Tensor) -> Float[Tensor, ""]:
        """The mean absolute difference at one match."""
        if match.projection is not None:
            student = self.projections[_key(match.address)](student.float())  # bfloat16 under autocast
        elif match.kept is not None:
            teacher = teacher[:, list(match.kept)]
        return (student.float() - teacher.float()).abs().mean()

    def forward(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """The feature loss: the mean over all matches.

        Reference: arXiv 2602.19161, section 3.3. Departure: mean instead of sum, so that its weight
        has the same meaning however many tensors are matched.
        """
        distances = [self.distance(m, student[m.address], teacher[m.address]) for m in self.matches]
        return torch.stack(distances).mean()


def _key(address: str) -> str:
    return address.replace(".", "/")  # module names cannot hold dots
