"""What benchmarks of speed share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import jaxtyping
import pytest
import torch


@pytest.fixture
def as_users_run_it() -> Iterator[None]:
    """All cores, and no checks of shapes, which cost small decoders a good part of their time."""
    num_threads, checked = torch.get_num_threads(), not jaxtyping.config.jaxtyping_disable
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", not checked)
    torch.set_num_threads(num_threads)
