"""Where a model's time goes, module by module."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from flashvaed_cli.errors import SpecError


def profile_modules(
    model: nn.Module,
    call: Callable[[], object],
    names: Iterable[str],
    *,
    num_warmup: int = 1,
    num_rounds: int = 5,
    budget_s: float | None = None,
    synchronize: Callable[[], object] | None = None,
) -> dict[str, float]:
    """Median wall time of modules within one call of the model.

    A module that runs several times in a call (chunks) counts the sum. Times are inclusive: a stage
    includes its layers, so only names that do not contain each other add up. Waiting for
    the device at every module makes the whole slower than without profiling; only the shares matter.

    Args:
        model: holds the modules.
        call: runs the model once.
        names: as in `model.named_modules()`.
        num_warmup: calls that are not counted.
        num_rounds: counted calls, at least 1.
        budget_s: a call begins only if it is expected to end within this many seconds. One too slow for a second is
            itself counted: what the first call warms up is a small part of a long one.
        synchronize: called before each reading of the clock.
    Returns:
        Milliseconds per name, in the order of `names`.
    Raises:
        SpecError: a name matches no module, or a module did not run through its `forward`.
    """
    if num_rounds < 1:
        raise ValueError("at least one round is needed")
    modules = _find_modules(model, names)
    rounds: list[dict[str, float]] = []
    started = time.perf_counter()
    for index in range(num_warmup + num_rounds):
        with _timed(modules, synchronize) as seconds:
            call()
        rounds.append(dict(seconds))
        spent_s = time.perf_counter() - started
        if budget_s is not None and spent_s * (index + 2) / (index + 1) > budget_s:
            break
    rounds = rounds[num_warmup:] or rounds[-1:]
    if idle := [name for name in modules if not all(name in seconds for seconds in rounds)]:
        raise SpecError(f"modules that did not run during the profiled call: {', '.join(idle)}")
    return {name: 1e3 * statistics.median(seconds[name] for seconds in rounds) for name in modules}


def _find_modules(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    known = dict(model.named_modules(remove_duplicate=False))
    wanted = list(names)
    if unknown := [name for name in wanted if name not in known]:
        raise SpecError(f"no module of {type(model).__name__} is named {', '.join(unknown)}")
    return {name: known[name] for name in wanted}


@contextmanager
def _timed(modules: dict[str, nn.Module], synchronize: Callable[[], object] | None) -> Iterator[dict[str, float]]:
    """Hook the modules while the block runs; yields the seconds by name."""
    seconds: dict[str, float] = {}
    starts: dict[str, float] = {}

    def now() -> float:
        if synchronize is not None:
            synchronize()
        return time.perf_counter()

    def start(name: str, *_: object) -> None:
        starts[name] = now()

    def stop(name: str, *_: object) -> None:
        seconds[name] = seconds.get(name, 0.0) + now() - starts[name]

    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(partial(start, name)))
            handles.append(module.register_forward_hook(partial(stop, name)))
        yield seconds
    finally:
        for handle in handles:
            handle.remove()
