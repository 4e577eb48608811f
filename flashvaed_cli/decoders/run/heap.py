"""Freed tensors go back to the system at once, so that a process takes what lives and not what lay around.

The C library's heap grows at its end: a frame that is to be remembered, laid between two temporaries, keeps the
holes around it from being joined or returned, and a decoder's heap became up to twice what lives in it.
"""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # <malloc.h>
_MAPPED_FROM_BYTES = 1 << 20


def return_freed_memory() -> bool:
    """Have tensors of a megabyte and more mapped one by one, for the rest of the process: about a tenth slower.

    Returns:
        Whether it could be done: only glibc has the switch. CUDA has its own allocator, and needs none.
    Reference:
        mallopt(3), M_MMAP_THRESHOLD.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES) == 1
