"""Small seeded LTX-Video decoders: every version, causal or centred, original, converted and pruned."""

from __future__ import annotations

from flashvaed_cli.decoders.modules.coder import Decoder
from flashvaed_cli.decoders.spec.coders import DecoderSpec
from flashvaed_cli.families.ltx.config import with_time_padding
from flashvaed_cli.families.registry import get_family
from flashvaed_cli.surgery.respec import converted_spec, narrowed_spec
from tests.toy import fill_, kept_of

VERSIONS = ("ltx-video-0.9.0", "ltx-video-0.9.1", "ltx-video-0.9.5", "ltx-2", "ltx-2.3")
BASE_WIDTH, LATENT_WIDTH = 4, 4


def ltx_spec(version: str = VERSIONS[0], *, causal: bool = False) -> DecoderSpec:
    """The original at base width 4, with 4 latent channels."""
    spec = get_family(version).decoder_spec(BASE_WIDTH, LATENT_WIDTH)
    return with_time_padding(spec, "first" if causal else "edges")


def flash_ltx_spec(version: str = VERSIONS[0], *, causal: bool = False) -> DecoderSpec:
    """Three quarters of the shallow stages' channels, and the paper's operators."""
    spec, family = ltx_spec(version, causal=causal), get_family(version)
    return converted_spec(narrowed_spec(spec, kept_of(spec, family.shallow_stages)), family.paper_operators)


def ltx_decoder(spec: DecoderSpec, seed: int = 0) -> Decoder:
    """A decoder with random weights, shifts of the norms too."""
    decoder = Decoder(spec).eval().requires_grad_(False)
    fill_(decoder, seed)
    for name, parameter in decoder.named_parameters():
        if name.endswith("beta"):
            parameter.normal_(std=0.1)
    return decoder
