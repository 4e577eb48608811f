"""Other people's code, cloned where it is measured or compared, never into the tree."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

FOLDER = Path(os.environ.get("FLASHVAED_BENCH_PEERS", "build/peers"))
REPOSITORIES = {
    "Flash-VAED": "https://github.com/Aoko955/Flash-VAED",
    "SeedVR": "https://github.com/ByteDance-Seed/SeedVR",
    "taehv": "https://github.com/madebyollin/taehv",
}


class NotAtHand(Exception):
    """Why a peer's code cannot be run."""


def clone_of(repository: str) -> Path:
    """The folder of a clone, which is made if there is none.

    Raises:
        NotAtHand: it cannot be cloned.
    """
    clone = FOLDER / repository
    if not clone.is_dir():
        command = ["git", "clone", "--quiet", "--depth", "1", REPOSITORIES[repository], str(clone)]
        if subprocess.run(command, check=False, capture_output=True, timeout=120).returncode:
            raise NotAtHand(f"{REPOSITORIES[repository]} cannot be cloned into {clone}")
    return clone
