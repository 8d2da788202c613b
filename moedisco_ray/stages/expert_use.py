"""Which experts of a trained MoE the text of each cluster selects, and the sub-models' experts that follow from it.

Each sub-model gets E / C experts, those that hold the largest shares of their clusters' selections in total. So
sub-models lose the least of what the start does with their text, however experts are numbered.

Shapes: R MoE layers, C clusters, E experts, g = E / C, B windows, L sequence length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
from torch import Tensor
from transformers import PreTrainedModel

from moedisco_ray.core.config import derived
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.models import group_size, specialise
from moedisco_ray.models.expert_order import Order
from moedisco_ray.models.freed_memory import reused_memory
from moedisco_ray.models.streamed import streamed_model
from moedisco_ray.packed_tokens import TokenStream
from moedisco_ray.stages.calibration_text import Batch, spread
from moedisco_ray.stages.context import Context
from moedisco_ray.stages.routers import RouterMeter, RouterStatistics
from moedisco_ray.stages.scoring import Observe, default_dtype, document_nats

FILE = "experts.json"
"""File next to the untrained sub-models that says which experts of the start they have."""
SHARES = ("own_share", "own_share_by_index")
_TIE = 1e-9
"""What an expert in its place by index counts more, so that equal choices are made by index."""


def samples(context: Context) -> list[Batch]:
    """Windows of the text of each cluster without an owner, spread evenly over it: the same number of each."""
    config = context.config
    length = config.corpus.sequence_length
    wanted = max(1, derived.use_tokens(config) // config.cluster_count // length)
    shards = [context.of("cluster") / "shards" / str(k) for k in range(config.shared_clusters)]
    streams = [TokenStream([path], length, context.store) for path in shards]
    return [
        batch
        for k, stream in enumerate(streams)
        if len(stream)
        for batch in spread(stream, min(wanted, len(stream)), k)
    ]


def groups(counted: RouterStatistics) -> dict[str, Any]:
    """Give the experts of each layer to the clusters.

    Args:
        counted: Selections of the start's routers, with one group per cluster.

    Returns:
        Content of `experts.json`: `layers`, with `layer` and `experts`, the experts of all clusters, one after the
        other; `own_share`, the share of each cluster's selections that its own experts hold, mean over clusters and
        layers; and `own_share_by_index`, the same for groups by index.
    """
    chosen_RE = [assigned(counts_CE) for counts_CE in counted.selections_RGE]
    by_index_RE = [np.arange(len(chosen_E)) for chosen_E in chosen_RE]
    return {
        "layers": [
            {"layer": layer, "experts": chosen_E.tolist()}
            for layer, chosen_E in zip(counted.layers, chosen_RE, strict=True)
        ],
        **{
            name: float(np.mean(list(map(own_share, counted.selections_RGE, order_RE))))
            for name, order_RE in zip(SHARES, (chosen_RE, by_index_RE), strict=True)
        },
    }


def selections(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    batches: Sequence[Batch],
    clusters: int,
    *,
    prefix: int,
    sequence_length: int,
    device: str = "cpu",
) -> tuple[RouterStatistics, NDArray[np.float64]]:
    """Count the selections of an MoE's routers, with one group per cluster, and measure its loss.

    Args:
        tensors: Canonical tensors of the MoE.
        config: Its `config.json`.
        batches: Text of the clusters.
        clusters: Number of clusters.
        prefix: The token before each window.
        sequence_length: Length of a window.
        device: Device that the MoE runs on, in parts if it is large.

    Returns:
        The counts, and the nats of each window.
    """
    model = streamed_model(tensors, config, dtype=default_dtype(device), device=device)
    cluster_N = np.concatenate([cluster_B for _, cluster_B in batches])
    with reused_memory(device), RouterMeter(model, cluster_N, clusters) as meter:
        nats_N = _nats(model, batches, prefix, sequence_length, meter.observe)
    return meter.statistics(), nats_N


def window_nats(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    batches: Sequence[Batch],
    *,
    prefix: int,
    sequence_length: int,
    device: str = "cpu",
) -> NDArray[np.float64]:
    """Nats of each window under a model; see `selections`."""
    model = streamed_model(tensors, config, dtype=default_dtype(device), device=device)
    with reused_memory(device):
        return _nats(specialise(model), batches, prefix, sequence_length)


def _nats(
    model: PreTrainedModel, batches: Sequence[Batch], prefix: int, sequence_length: int, observe: Observe | None = None
) -> NDArray[np.float64]:
    return document_nats(
        model,
        [window_L.astype(np.int32) for tokens_BL, _ in batches for window_L in tokens_BL],
        prefix=prefix,
        sequence_length=sequence_length,
        batch_tokens=max(tokens_BL.size for tokens_BL, _ in batches),
        observe=observe,
    )


def order_in(use: Mapping[str, Any]) -> dict[int, list[int]]:
    """The order of the experts of each layer in the content of `experts.json`."""
    return {entry["layer"]: entry["experts"] for entry in use["layers"]}


def read_order(path: Path | None) -> Order:
    """The order of the experts of each layer in `experts.json`; empty without a file: all are in order of index."""
    return {} if path is None else order_in(read_json(path))


def assigned(counts_CE: NDArray[np.int64]) -> NDArray[np.int64]:
    """The experts of one layer for each cluster: E / C for each, with the largest shares of its selections in total.

    Every cluster counts the same, however long its text is. Clusters' experts are in the order of their indices, and of
    equally good choices the one is taken that leaves most experts in their group by index.

    Args:
        counts_CE: How often the text of each cluster selected each expert.

    Returns:
        The experts, cluster after cluster [E].

    Raises:
        ConfigError: The number of experts is not a multiple of the number of clusters.
    """
    clusters, experts = counts_CE.shape
    owner_E = np.arange(experts) // group_size(experts, clusters)
    gain_CE = _shares(counts_CE) + _TIE * (owner_E == np.arange(clusters)[:, None])
    expert_E, place_E = optimize.linear_sum_assignment(gain_CE[owner_E].T, maximize=True)
    found: NDArray[np.int64] = expert_E[np.lexsort((expert_E, owner_E[place_E]))]
    return found


def own_share(counts_CE: NDArray[np.int64], order_E: NDArray[np.int64]) -> float:
    """Share of each cluster's selections that the experts in its places hold, mean over clusters with selections.

    Args:
        counts_CE: How often the text of each cluster selected each expert.
        order_E: The experts, cluster after cluster.
    """
    clusters, _ = counts_CE.shape
    share_CCg = _shares(counts_CE)[:, order_E].reshape(clusters, clusters, -1)
    return float(np.trace(share_CCg.sum(axis=2)) / max(1, np.count_nonzero(counts_CE.sum(axis=1))))


def _shares(counts_CE: NDArray[np.int64]) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = counts_CE / np.maximum(counts_CE.sum(axis=1, keepdims=True), 1)
    return shares
