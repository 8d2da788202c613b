"""The order in which training visits the windows."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray


def batch_indices(seed: int, step: int, batch: int, windows: int) -> NDArray[np.int64]:
    """Indices [batch] of the windows of a training step; they depend on the step alone, so that a resumed run is exact.

    Sample s = step * batch + j belongs to epoch s // windows and takes position s % windows in that epoch's permutation
    (Philox, key (seed, epoch)). So each epoch visits each window once, whatever the batch size.

    Args:
        seed: Seed of the data order.
        step: Step, counted from 0.
        batch: Sequences per step over all workers.
        windows: Number of windows in the stream.
    """
    samples = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
    epochs, positions = np.divmod(samples, windows)
    chosen = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = _permutation(seed, int(epoch), windows)[positions[here]]
    return chosen


@functools.lru_cache(maxsize=2)  # a step touches at most two epochs, unless the corpus is smaller than a batch
def _permutation(seed: int, epoch: int, windows: int) -> NDArray[np.int64]:
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(windows)
    order.flags.writeable = False
    return order
