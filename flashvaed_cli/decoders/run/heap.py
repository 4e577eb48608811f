"""Return freed tensors to the system at once, so that a process holds no more than its live tensors.

The C library's heap grows at its end: a remembered frame between two temporaries keeps the holes around it from being
merged or returned, and a decoder's heap grew to twice the size of its live tensors.
"""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # <malloc.h>
_MAPPED_FROM_BYTES = 1 << 20


def return_freed_memory() -> bool:
    """Map tensors of 1 MiB and more one by one, for the rest of the process; decoding takes about 10 % longer.

    Returns:
        Whether it worked: only glibc has the switch. CUDA has an allocator of its own and does not need it.
    Reference:
        mallopt(3), M_MMAP_THRESHOLD.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES) == 1
