"""Fetch checkpoints from the Hugging Face Hub, into its cache."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from flashvaed_cli.errors import ArtifactError

SCHEME = "hf://"
_FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
_VERBOSITY = "HF_HUB_VERBOSITY"  # huggingface_hub's own setting: if set, the user wants its messages
_PATIENCE_S = 10.0
_ADDRESS = re.compile(
    r"hf://(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)(@(?P<early>[\w.-]+))?(/(?P<path>[^@\\]*?))?/?(@(?P<late>[\w./-]+))?"
)
_SAFE_TAG = re.compile(r"[\w-]{1,128}")  # what a file of the cache is called: a hash
_SAFE_COMMIT = re.compile(r"[0-9a-f]{40}")
_FOLDER_PATTERNS = ("config.json", "*.safetensors", "*.safetensors.index*.json")


@dataclass(frozen=True)
class HubAddress:
    """`hf://owner/name/path@revision`. An empty path is the whole repository."""

    repo: str
    path: str
    revision: str | None


def parse_hub_address(address: str) -> HubAddress:
    """Parse an `hf://` address; the revision may also follow the repository, as in huggingface_hub.

    Raises:
        ArtifactError: not of that form.
    """
    match = _ADDRESS.fullmatch(address)
    parts = () if match is None else [match[name] or "" for name in ("owner", "name", "path", "early", "late")]
    if match is None or (match["early"] and match["late"]) or not all(map(_is_inside, parts)):
        raise ArtifactError(
            f"{address}: not a Hub address. The form is hf://OWNER/REPO/PATH/IN/REPO, with @REVISION at the end "
            "for any but the newest."
        )
    return HubAddress(f"{match['owner']}/{match['name']}", match["path"] or "", match["early"] or match["late"])


def _is_inside(path: str) -> bool:
    """Whether a relative path stays in its folder."""
    return not path.startswith("/") and not {".", ".."} & set(path.split("/"))


def fetch_hub_file(address: str, *, only_cached: bool = False) -> Path:
    """The file or diffusers folder at an `hf://` address, downloaded or from the cache.

    A path that ends like a weights file is one file; any other is a folder, of which `config.json` and the
    weights are fetched. What the Hub calls its files is checked before anything is written under such a name.

    Args:
        only_cached: do not use the network.
    Raises:
        ArtifactError: no such repository, revision or path, no permission, names that leave the cache, or no network
            and not in the cache.
    """
    # huggingface_hub takes a while to import and few runs need it.
    from huggingface_hub import hf_hub_download, logging, snapshot_download

    place = parse_hub_address(address)
    if _VERBOSITY not in os.environ:
        logging.set_verbosity_error()  # our own error says what went wrong
    folder = f"{place.path}/" if place.path else ""
    wanted = [folder + pattern for pattern in _FOLDER_PATTERNS]
    is_file = place.path.endswith(_FILE_SUFFIXES)
    try:
        answers = not only_cached and _answers(place, [place.path] if is_file else wanted)
        if is_file:
            return Path(hf_hub_download(place.repo, place.path, revision=place.revision, local_files_only=not answers))
        snapshot = snapshot_download(
            place.repo, revision=place.revision, allow_patterns=wanted, local_files_only=only_cached
        )
        found = Path(snapshot) / place.path
    except ArtifactError:
        raise
    except Exception as error:  # the library's own errors have no common class, and its network stacks add theirs
        if only_cached:
            raise ArtifactError(
                f"{address} is not in the Hub's cache, and a file that names an address does not make this program "
                "fetch it. Allow that with --allow-download."
            ) from error
        raise ArtifactError(f"{address}: {_reason(error, place)}") from error
    if not found.is_dir():
        raise ArtifactError(f"{address}: repository {place.repo} has no folder {place.path} with a config.json.")
    return found


def _answers(place: HubAddress, wanted: Sequence[str]) -> bool:
    """Whether the Hub responds at all, tried once: downloading a file retries six times over half a minute.

    Raises:
        ArtifactError: what it calls the wanted files would be written outside the cache.
    """
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().repo_info(place.repo, revision=place.revision, timeout=_PATIENCE_S)
        names = [file.rfilename for file in getattr(info, "siblings", None) or ()]
        for name in [name for name in names if any(fnmatch(name, pattern) for pattern in wanted)]:
            about = get_hf_file_metadata(hf_hub_url(place.repo, name, revision=place.revision), timeout=_PATIENCE_S)
            _check_names(place, name, about.etag or "", about.commit_hash or "")
    except HfHubHTTPError:
        return True  # a refusal is a response: the download reports it
    except ArtifactError:
        raise
    except Exception:  # offline, or any error of a network stack
        return False
    return True


def _check_names(place: HubAddress, name: str, tag: str, commit: str) -> None:
    """Raise ArtifactError unless a file's name, tag and commit, which become cache paths, stay inside the cache."""
    if not _is_inside(name) or not _SAFE_TAG.fullmatch(tag) or not _SAFE_COMMIT.fullmatch(commit):
        raise ArtifactError(
            f"hf://{place.repo}: the Hub calls {name!r:.80} {tag!r:.80} (commit {commit!r:.50}), which cannot name a "
            "file of the cache. Nothing was downloaded: check HF_ENDPOINT."
        )


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
        return f"not a valid repository name: {error}"
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
