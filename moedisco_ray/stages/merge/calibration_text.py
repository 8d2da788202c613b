"""The text on which routers are calibrated and merges are compared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moedisco_ray.core.config import Merge
from moedisco_ray.core.errors import CorpusError
from moedisco_ray.stages.context import Context, cluster_tokens, submodel_seed
from moedisco_ray.stages.merge.calibrate import Batch
from moedisco_ray.training.packed_tokens import TokenStream, batch_indices

_CALIBRATION_BATCH = 16


def calibration(context: Context) -> tuple[list[Batch], list[NDArray[np.int32]]]:
    """Windows of each cluster's own text to calibrate routers on, and other windows to compare merges on.

    The number of windows is proportional to the cluster's tokens. Documents of other clusters, on which a sub-model also trains
    if clusters overlap, are left out. Merges are compared on the last windows of a sub-model's first epoch, which it has not
    trained on unless it completed the epoch.

    Returns:
        Calibration batches, and token windows to compare merges on, which are empty unless `merge.backbone` is `auto`.

    Raises:
        CorpusError: There is no window to compare merges on.
    """
    config = context.config
    length = config.corpus.sequence_length
    sizes = cluster_tokens(context)
    streams = [TokenStream([context.of("cluster") / "shards" / str(k)], length) for k in range(len(sizes))]
    # A cluster's own text comes first; its last window may end with text of other clusters.
    own = [min(len(stream), max(1, size // length)) for stream, size in zip(streams, sizes, strict=True)]
    counts = calibration_windows(config.merge, length, sizes, own)
    batches: list[Batch] = []
    held_out: list[NDArray[np.int32]] = []
    for k, (stream, (wanted, held)) in enumerate(zip(streams, counts, strict=True)):
        pass_N = batch_indices(submodel_seed(config, k), 0, len(stream), len(stream))
        order_N = pass_N[pass_N < own[k]]
        held_out += [stream.window(int(i))[1:].astype(np.int32) for i in order_N[len(order_N) - held:]]
        rest_N = np.sort(order_N[:len(order_N) - held])
        # Spread the windows evenly: the first ones could all be of one long document.
        chosen = rest_N[np.linspace(0, len(rest_N) - 1, wanted).astype(np.int64)]
        for some in np.array_split(chosen, -(-wanted // _CALIBRATION_BATCH)):
            tokens_BL = np.stack([stream.window(int(i))[:-1] for i in some])
            batches.append((tokens_BL, np.full(len(some), k, dtype=np.int64)))
    if config.merge.backbone == "auto" and not held_out:
        remedy = "the clusters have no window of text to spare for a comparison; choose a rule, or add text"
        raise CorpusError("merge.backbone", "auto", remedy)
    return batches, held_out


def calibration_windows(settings: Merge, length: int, tokens: Sequence[int], available: Sequence[int]) -> list[tuple[int, int]]:
    """Per cluster, the number of windows to calibrate routers on and the number to compare merges on.

    Args:
        settings: The merge section.
        length: Tokens of a window.
        tokens: Tokens of each cluster.
        available: Number of windows that each cluster's own text has.
    """
    counts = []
    for size, windows in zip(tokens, available, strict=True):
        share = size / sum(tokens) / length
        held = min(windows // 2, max(1, round(settings.auto_tokens * share))) if settings.backbone == "auto" else 0
        counts.append((min(windows - held, max(1, round(settings.calibration_tokens * share))), held))
    return counts


def sample(context: Context) -> list[Batch]:
    """Calibration batches of `merge.calibration_tokens` tokens, spread evenly over the whole corpus and labelled as one cluster."""
    stream = TokenStream([context.of("corpus") / "shards"], context.config.corpus.sequence_length)
    wanted = sample_windows(context.config.merge, stream.sequence_length, len(stream))
    chosen = np.linspace(0, len(stream) - 1, wanted).astype(np.int64)
    return [
        (np.stack([stream.window(int(i))[:-1] for i in some]), np.zeros(len(some), dtype=np.int64))
        for some in np.array_split(chosen, -(-wanted // _CALIBRATION_BATCH))]


def sample_windows(settings: Merge, length: int, available: int) -> int:
    """Number of windows that `sample` takes out of the `available` windows of the corpus."""
    return min(available, max(1, settings.calibration_tokens // length))
