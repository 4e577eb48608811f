"""How much memory a decoder may still take, so that what cannot fit is not tried: Linux kills without warning."""

from __future__ import annotations

from pathlib import Path

import torch

_CGROUP = (  # limit and use of the container: version 2, version 1
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_bytes(device: torch.device | str) -> int | None:
    """Bytes that are free on a device now, within the container's limit; None if unknown."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    found = [number for number in (_available(), *(_left(*files) for files in _CGROUP)) if number is not None]
    return min(found, default=None)


def _available() -> int | None:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _left(limit_file: str, use_file: str) -> int | None:
    limit, use = _read(limit_file).strip(), _read(use_file).strip()
    return max(0, int(limit) - int(use)) if limit.isdigit() and use.isdigit() else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""
