"""Best-fit decreasing: whole documents in as few windows as a simple rule finds."""

from __future__ import annotations

import bisect

import numpy as np
from numpy.typing import NDArray


def best_fit(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Window of each document, counted from 0; the result depends on the lengths and their order alone.

    The longest document comes first, and each goes into the fullest window that has room for it, or into a new one.

    Args:
        lengths: Number of tokens of each document, from 1 to `capacity`.
        capacity: Maximum number of tokens of a window.
    """
    windows = np.empty(len(lengths), dtype=np.int64)
    spaces: list[int] = []  # numbers of free tokens that some windows have, ascending
    with_space: dict[int, list[int]] = {}
    opened = 0
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        place = bisect.bisect_left(spaces, length)
        if place < len(spaces):
            space = spaces[place]
            window = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[place]
        else:
            space, window, opened = capacity, opened, opened + 1
        windows[document] = window
        if left := space - length:
            if left not in with_space:
                bisect.insort(spaces, left)
            with_space.setdefault(left, []).append(window)
    return windows
