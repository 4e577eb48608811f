"""How many queries attention works on at once where its products are convolutions, and what memory that takes.

Imports no torch, so that memory predictions can use it too.
"""

from __future__ import annotations

LOGITS_AT_ONCE = 1 << 22
"""Elements: 16 MiB, which should stay in the cache."""

FEWEST_QUERIES = 128


def queries_at_once(num_keys: int) -> int:
    """As many as fill `LOGITS_AT_ONCE` with their logits, but not fewer than a product is worth the call for."""
    return max(LOGITS_AT_ONCE // num_keys, FEWEST_QUERIES)


def working_elements(num_queries: int, num_keys: int, width: int) -> int:
    """Elements that live at once beside inputs and output: logits, their softmax, a part's output, keys and values.

    Keys are scaled and values transposed, and torch lays one of them out once more.
    """
    at_once = min(queries_at_once(num_keys), num_queries)
    return at_once * (2 * num_keys + width) + 3 * num_keys * width
