"""The text on which routers are calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moedisco_ray.core.config import Merge
from moedisco_ray.core.limits import BATCH_TOKENS, CALIBRATION_WINDOWS, SMALLER
from moedisco_ray.packed_tokens import TokenStream
from moedisco_ray.stages.context import Context, cluster_tokens

Batch = tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]]
"""Tokens [B, L] and the cluster of each document [B]."""


def calibration(context: Context) -> list[Batch]:
    """Calibration batches of each cluster's text; the number of windows is proportional to the cluster's tokens.

    Batches of a data owner's cluster hold text without an owner; see `router_shift`.
    """
    length, sizes, owners = context.config.corpus.sequence_length, cluster_tokens(context), context.config.owners
    shards = [context.of("cluster") / "shards" / str(k) for k in range(context.config.shared_clusters)]
    shards += [context.of("corpus") / "shards"] * len(owners)
    streams = [TokenStream([path], length, context.store) for path in shards]
    counts = calibration_windows(context.config.merge, length, sizes, list(map(len, streams)))
    return [
        batch
        for k, (stream, wanted) in enumerate(zip(streams, counts, strict=True))
        for batch in spread(stream, wanted, k)
    ]


def calibration_windows(settings: Merge, length: int, tokens: Sequence[int], available: Sequence[int]) -> list[int]:
    """Number of windows of each cluster to calibrate routers on.

    Args:
        settings: The merge section.
        length: Tokens of a window.
        tokens: Tokens of each cluster.
        available: Number of windows that each cluster's text has.
    """
    return [
        min(windows, max(1, round(settings.calibration_tokens * (size / sum(tokens) / length))))
        for size, windows in zip(tokens, available, strict=True)
    ]


def sample(context: Context) -> list[Batch]:
    """Calibration batches of `merge.calibration_tokens` tokens, evenly from the whole corpus, as one cluster."""
    stream = TokenStream([context.of("corpus") / "shards"], context.config.corpus.sequence_length, context.store)
    return spread(stream, sample_windows(context.config.merge, stream.sequence_length, len(stream)), 0)


def sample_windows(settings: Merge, length: int, available: int) -> int:
    """Number of windows that `sample` takes out of the `available` windows of the corpus."""
    return min(available, max(1, settings.calibration_tokens // length))


def spread(stream: TokenStream, wanted: int, cluster: int) -> list[Batch]:
    """Batches of windows spread evenly over the text, whose first windows could all be of one long document."""
    chosen = np.linspace(0, len(stream) - 1, wanted).astype(np.int64)
    size = min(CALIBRATION_WINDOWS, max(1, BATCH_TOKENS // stream.sequence_length))
    return [_batch(stream, some, cluster) for some in np.array_split(chosen, -(-wanted // size))]


def in_smaller_batches(batches: Sequence[Batch]) -> list[Batch]:
    """The same windows in batches of a quarter of the size, for a second try after memory ran out."""
    return [
        (tokens_bL, cluster_b)
        for tokens_BL, cluster_B in batches
        for tokens_bL, cluster_b in zip(
            np.array_split(tokens_BL, min(SMALLER, len(tokens_BL))),
            np.array_split(cluster_B, min(SMALLER, len(tokens_BL))),
            strict=True,
        )
    ]


def _batch(stream: TokenStream, windows: NDArray[np.int64], cluster: int) -> Batch:
    # The tokens of a window in place of its padding, which is no text of the cluster.
    filled = [stream.window(i)[: stream.filled(i)] for i in windows.tolist()]
    tokens_BL = np.stack([np.resize(tokens, stream.sequence_length) for tokens in filled])
    return tokens_BL, np.full(len(windows), cluster, dtype=np.int64)
