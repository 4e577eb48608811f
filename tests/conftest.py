"""What every test gets: checked tensor shapes, few threads, fixed seeds, signals that interrupt."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
from jaxtyping import install_import_hook


def _unless_nested(jaxtyped: Callable[..., Any]) -> Callable[..., Any]:
    """Functions within functions, prepared again at every call, are not checked: that took a twentieth of the time."""

    def decorator(*, typechecker: object) -> Callable[[Any], Any]:
        check = jaxtyped(typechecker=typechecker)
        return lambda found: found if "<locals>" in getattr(found, "__qualname__", "") else check(found)

    return decorator


# Before anything of the package is imported: shape annotations are checked at every call, where a test wants it.
install_import_hook(
    [
        f"flashvaed_cli.{room}"
        for room in (
            "numerics",
            "decoders.modules",
            "decoders.run",
            "decoders.variants.still",
            "calibrate",
            "surgery",
            "metrics",
            "media",
            "distill",
        )
    ],
    "beartype.beartype",
)
jaxtyping.jaxtyped = _unless_nested(jaxtyping.jaxtyped)  # which the hook's decorators look up

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent

hypothesis.settings.register_profile("flashvaed", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("flashvaed")
torch.set_num_threads(1)
os.environ["FLASHVAED_CACHE"] = "off"  # no test depends on what an earlier one left
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # what a shell hands to its background jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


UNCHECKED = tuple(
    REPOSITORY / "tests" / name for name in ("cli", "faults", "fuzz", "integration", "parity", "recipes", "unit/export")
)
"""Tests of these run whole commands, which takes twice as long with checked shapes (one module checks them), trace with
shapes that are symbols, where a check is a proof, or fuzz, where the error of a check is taken for our own."""
CHECKED_COMMANDS = REPOSITORY / "tests" / "integration" / "test_chain.py"


def pytest_collection_finish() -> None:
    """What has been imported stays: the garbage collector, a seventh of the time, need not go through it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before fixtures of any scope run."""
    is_checked = item.path == CHECKED_COMMANDS or not any(folder in item.path.parents for folder in UNCHECKED)
    is_checked = is_checked and item.get_closest_marker("unchecked") is None
    jaxtyping.config.update("jaxtyping_disable", not is_checked)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The clone that holds these tests."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real clips and checkpoints beside the clone; tests that need them are skipped where there are none."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared beside the clone: real clips and teachers are not at hand")
    return folder
