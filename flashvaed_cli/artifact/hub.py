"""Fetch checkpoints from the Hugging Face Hub, into its cache."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from flashvaed_cli.errors import ArtifactError

SCHEME = "hf://"
_FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
_VERBOSITY = "HF_HUB_VERBOSITY"  # huggingface_hub's own setting: who gives it wants its messages
_PATIENCE_S = 10.0
_ADDRESS = re.compile(
    r"hf://(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)(@(?P<early>[^/@]+))?(/(?P<path>[^@]*?))?/?(@(?P<late>[^@]+))?"
)


@dataclass(frozen=True)
class HubAddress:
    """`hf://owner/name/path@revision`. An empty path is the whole repository."""

    repo: str
    path: str
    revision: str | None


def parse_hub_address(address: str) -> HubAddress:
    """Take an `hf://` address apart; the revision may also stand after the repository, as huggingface_hub has it.

    Raises:
        ArtifactError: not of that form.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None or (match["early"] and match["late"]) or ".." in PurePosixPath(match["path"] or "").parts:
        raise ArtifactError(
            f"{address}: no Hub address. The form is hf://OWNER/REPO/PATH/IN/REPO, with @REVISION at the end "
            "if it shall not be the newest."
        )
    return HubAddress(f"{match['owner']}/{match['name']}", match["path"] or "", match["early"] or match["late"])


def fetch_hub_file(address: str) -> Path:
    """The file or diffusers folder at an `hf://` address, downloaded or out of the cache.

    A path that ends like a weights file is one file; any other is a folder, of which `config.json` and the
    safetensors are fetched.

    Raises:
        ArtifactError: no such repository, revision or path, no permission, or no network and not in the cache.
    """
    # huggingface_hub takes a while to import and few runs need it.
    from huggingface_hub import hf_hub_download, logging, snapshot_download

    place = parse_hub_address(address)
    if _VERBOSITY not in os.environ:
        logging.set_verbosity_error()  # what goes wrong is in our own error
    try:
        if place.path.endswith(_FILE_SUFFIXES):
            only_cached = not _answers(place)
            return Path(hf_hub_download(place.repo, place.path, revision=place.revision, local_files_only=only_cached))
        patterns = ["config.json", "*.safetensors", "*.safetensors.index.json"]
        folder = f"{place.path}/" if place.path else ""
        wanted = [folder + pattern for pattern in patterns]
        found = Path(snapshot_download(place.repo, revision=place.revision, allow_patterns=wanted)) / place.path
    except Exception as error:  # the library's own errors have no common class, and its network stacks add theirs
        raise ArtifactError(f"{address}: {_reason(error, place)}") from error
    if not found.is_dir():
        raise ArtifactError(f"{address}: repository {place.repo} has no folder {place.path} with a config.json.")
    return found


def _answers(place: HubAddress) -> bool:
    """Whether the Hub answers at all, asked once: a download of one file asks six times over half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        HfApi().repo_info(place.repo, revision=place.revision, timeout=_PATIENCE_S)
    except HfHubHTTPError:
        return True  # a refusal is an answer: the download says which
    except Exception:  # offline, or any error of a network stack
        return False
    return True


def _reason(error: Exception, place: HubAddress) -> str:
    """What went wrong, and the way out."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return f"no valid name of a repository: {error}"
    if isinstance(error, GatedRepoError):
        return f"{place.repo} asks for consent: accept its terms on huggingface.co, then run 'hf auth login'."
    if isinstance(error, RepositoryNotFoundError):
        return f"no repository {place.repo} on the Hub, or a private one (then run 'hf auth login')."
    if isinstance(error, RevisionNotFoundError):
        return f"repository {place.repo} has no revision {place.revision}."
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return f"repository {place.repo} has no {place.path or 'such file'}."
    return (
        f"cannot be fetched ({type(error).__name__}: the Hub cannot be reached or the download failed) and is not in "
        f"the cache ({constants.HF_HUB_CACHE}). Download it by hand and give the path of the file, or copy a cache "
        "from a machine that has it and point HF_HOME there."
    )
