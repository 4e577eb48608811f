"""The original that a checkpoint descends from: found again, verified, and compared with it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flashvaed_cli.artifact.checkpoint import BUILTIN_SCHEME, Checkpoint, load_verified, locate
from flashvaed_cli.artifact.header import Lineage
from flashvaed_cli.decoders.spec.groups import tensor_widths
from flashvaed_cli.errors import ArtifactError, FlashVaedError
from flashvaed_cli.paths import user_path


def load_original(
    checkpoint: Checkpoint,
    override: str | None,
    builtins: Mapping[str, Path],
    *,
    needs_encoder: bool = True,
    allow_download: bool = False,
) -> Checkpoint:
    """The original that a checkpoint descends from, or the checkpoint itself if it names none.

    What a checkpoint records is untrusted. A recorded path is opened only to compute its SHA-256, and read
    only if that matches the record. A recorded Hub address is looked up in the cache.

    Args:
        override: the user's `--original`; must be the same file as the recorded one, by its SHA-256.
        allow_download: whether a recorded Hub address may be downloaded.
    Raises:
        ArtifactError: not found, another file than recorded, another latent space, or without an encoder.
    """
    recorded = checkpoint.header.original if checkpoint.header is not None else None
    if override is not None:
        original = load_verified(override, checkpoint, recorded, locate(override, builtins))
    elif recorded is not None:
        original = _load_recorded(checkpoint, recorded, builtins, allow_download)
    else:
        original = checkpoint
    if needs_encoder:
        original.require_encoder()
    if original.latent_width != checkpoint.latent_width:
        raise ArtifactError(
            f"{original.location} has {original.latent_width} latent channels, {checkpoint.location} has "
            f"{checkpoint.latent_width}: not its original. Give the right one with --original."
        )
    _check_kept_channels(checkpoint, original)
    return original


def _load_recorded(
    checkpoint: Checkpoint, recorded: Lineage, builtins: Mapping[str, Path], allow_download: bool
) -> Checkpoint:
    """Load the recorded original from its old place or, if it was moved together with the artifact, from beside it."""
    location = recorded.location
    is_path = "://" not in location and not location.startswith(BUILTIN_SCHEME)
    try:
        if is_path and not user_path(location).exists():
            beside = Path(checkpoint.location).parent / location
            location = str(beside) if beside.exists() else location
        path = locate(location, builtins, may_download=allow_download)
        return load_verified(location, checkpoint, recorded, path)
    except (FlashVaedError, OSError) as error:
        raise ArtifactError(
            f"the original of {checkpoint.location} (SHA-256 {recorded.sha256:.64}) cannot be loaded: {error}\n"
            "Say where it is now with --original."
        ) from error


def _check_kept_channels(checkpoint: Checkpoint, original: Checkpoint) -> None:
    """Raise ArtifactError if the kept channels include some that the original does not have."""
    if not checkpoint.kept_channels or original.decoder is None:
        return
    widths = tensor_widths(original.decoder.spec)
    for address, indices in checkpoint.kept_channels.items():
        if max(indices, default=0) >= widths.get(address, 0):
            raise ArtifactError(
                f"{checkpoint.location}: kept_channels names channel {max(indices)} of {address}, where "
                f"{original.location} has {widths.get(address, 0)} channels. Make the artifact again."
            )
