"""Evaluate models overall, per cluster and per source, with statistics of their routers.

Axes: N documents, R routers, G groups, E experts.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from moedisco_ray.core.limits import BATCH_TOKENS
from moedisco_ray.core.records.events import Advance, no_advance
from moedisco_ray.models import open_checkpoint, reused_memory, specialise
from moedisco_ray.models.streamed import open_streamed, streamed_model
from moedisco_ray.stages.evaluate.ensemble import Distances, ensemble_nats
from moedisco_ray.stages.routers import (
    RouterMeter,
    RouterStatistics,
    dead_experts,
    entropy,
    expert_load,
    expert_similarity,
    normalized_mutual_information,
)
from moedisco_ray.stages.scoring import Score, default_dtype, document_nats, document_scores, perplexity, token_nats
from moedisco_ray.stages.start import Start, start_model
from moedisco_ray.stages.text.validation import Documents


def evaluate(
    model_dir: Path,
    documents: Documents,
    labels_N: NDArray[np.integer[Any]] | None = None,
    *,
    prefix: int,
    sequence_length: int,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    batch_tokens: int = BATCH_TOKENS,
    resident: bool | None = None,
    advance: Advance = no_advance,
) -> dict[str, Any]:
    """Measure one model.

    Args:
        model_dir: A Hugging Face directory.
        documents: Documents to measure on.
        labels_N: Cluster of each document; None without clusters.
        prefix: The token before each document.
        sequence_length: Length of a training sequence.
        device: Device to run the model on.
        dtype: Dtype of the model. By default it is bf16 on a GPU and fp32 elsewhere. Sums are in float64.
        batch_tokens: Maximum positions of a forward pass.
        resident: Whether weights stay loaded; None if they do where the model is small.
        advance: Receives the number of tokens measured.

    Returns:
        A dictionary of JSON values: the figures of `Score.to_dict`, and

        * `clusters`: the same figures per cluster, with `cluster`; `sources`: the same figures per source, with
          `source` (empty if there is only one source and it has no name);
        * `routers`: per MoE layer `layer`, `load` [E] (share of the top-k selections), `dead` (number of experts that
          get almost no tokens, see `dead_experts`), `token_entropy` (mean over tokens, in nats), `load_entropy` (of
          `load`, in nats), `nmi_cluster` and `nmi_source` (normalised mutual information of each token's top-1 expert
          and its document's label), `similarity` (see `expert_similarity`);
        * `load_by_cluster` [clusters][E] and `load_by_source` {source: [E]}, means over layers;
        * `specialisation`: `cluster` and `source`, the normalised mutual information between that label of a document
          and the expert that is most often top-1 in it. It is computed per layer and averaged over layers, because
          expert 3 of one layer and expert 3 of another are related only if experts come from sub-models. None without
          such a label.
    """
    source_N, sources = _source_codes(documents)
    cluster_N, clusters = _cluster_codes(documents, labels_N)
    columns = max(1, len(clusters))
    groups = max(1, len(sources)) * columns
    # Do not call `specialise`, which bypasses routers with a single expert: the hooks need every router to run.
    model = open_streamed(model_dir, dtype=dtype or default_dtype(device), device=device, resident=resident)
    with reused_memory(device), RouterMeter(model, source_N * columns + cluster_N, groups) as meter:
        nats_N = document_nats(
            model,
            documents.tokens,
            prefix=prefix,
            sequence_length=sequence_length,
            batch_tokens=batch_tokens,
            observe=meter.observe,
            advance=advance,
            loss_masks=documents.loss_masks,
        )
    return {
        **_by_group(document_scores(documents, nats_N), cluster_N, clusters, source_N, sources),
        **_routers(meter.statistics(), cluster_N, clusters, source_N, sources, similarity=_similarity(model_dir)),
    }


def xz_bits_per_byte(documents: Documents) -> float:
    """Bits per byte of the documents' text, compressed as one file by xz with its default preset."""
    text = "".join(documents.texts).encode()
    return 8 * len(lzma.compress(text)) / max(1, len(text))


def evaluate_stages(
    models: Mapping[str, Path],
    submodels: Sequence[Path],
    documents: Documents,
    labels_N: NDArray[np.integer[Any]] | None,
    *,
    prefix: int,
    sequence_length: int,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    batch_tokens: int = BATCH_TOKENS,
    resident: bool | None = None,
    advance: Advance = no_advance,
) -> dict[str, Any]:
    """Measure the model of every training stage; one decoder layer is in memory at a time.

    Args:
        models: Model directory of each stage that makes one model, in the order of the stages; the last is the finished
            model.
        submodels: Directory of each cluster's sub-model, which is measured on that cluster's documents alone; may be
            none.
        documents: Documents to measure on.
        labels_N: Cluster of each document; None without clusters.
        prefix: The token before each document.
        sequence_length: Length of a training sequence.
        device: Device to run the model on.
        dtype: Dtype of the model. By default it is bf16 on a GPU and fp32 elsewhere.
        batch_tokens: Maximum positions of a forward pass.
        resident: Whether weights stay loaded; None if they do where the model is small.
        advance: Receives the number of tokens measured.

    Returns:
        The result of `evaluate` for the finished model, and `stages`: the figures of `Score.to_dict` for each stage.
        For `submodels` they are totals over the sub-models, and `units` has the figures of each.
    """
    settings: dict[str, Any] = {
        "prefix": prefix,
        "sequence_length": sequence_length,
        "batch_tokens": batch_tokens,
        "advance": advance,
    }

    def score(directory: Path, chosen: Documents) -> Score:
        if not len(chosen):
            return Score()
        model = open_streamed(directory, dtype=dtype or default_dtype(device), device=device, resident=resident)
        return perplexity(specialise(model), chosen, **settings)

    *earlier, (last, finished) = models.items()
    stages: dict[str, Any] = {stage: score(directory, documents).to_dict() for stage, directory in earlier}
    if labels_N is not None and submodels:
        units = [score(directory, documents.where(labels_N == k)) for k, directory in enumerate(submodels)]
        stages["submodels"] = {**sum(units, Score()).to_dict(), "units": [unit.to_dict() for unit in units]}
    final = evaluate(finished, documents, labels_N, device=device, dtype=dtype, resident=resident, **settings)
    stages[last] = {key: final[key] for key in Score().to_dict()}
    return {**final, "stages": stages}


def evaluate_start(
    start: Start,
    documents: Documents,
    labels_N: NDArray[np.integer[Any]] | None = None,
    *,
    prefix: int,
    sequence_length: int,
    device: str = "cpu",
    batch_tokens: int = BATCH_TOKENS,
    resident: bool | None = None,
    advance: Advance = no_advance,
) -> dict[str, Any]:
    """Measure the trained model that a run starts from; one decoder layer is in memory at a time.

    Args:
        start: The run's start.
        documents: Documents to measure on.
        labels_N: Cluster of each document; None without clusters.
        prefix: The token before each document.
        sequence_length: Length of a training sequence.
        device: Device to run the model on.
        batch_tokens: Maximum positions of a forward pass.
        resident: Whether weights stay loaded; None if they do where the model is small.
        advance: Receives the number of tokens measured.

    Returns:
        The figures of `Score.to_dict`, and `clusters` and `sources`: the same figures per cluster and source, as in
        `evaluate`.

    Raises:
        CheckpointError: The model cannot be read.
    """
    nats_N = document_nats(
        open_start(start, device, resident=resident),
        documents.tokens,
        prefix=prefix,
        sequence_length=sequence_length,
        batch_tokens=batch_tokens,
        advance=advance,
        loss_masks=documents.loss_masks,
    )
    source_N, sources = _source_codes(documents)
    cluster_N, clusters = _cluster_codes(documents, labels_N)
    return _by_group(document_scores(documents, nats_N), cluster_N, clusters, source_N, sources)


def open_start(start: Start, device: str, *, resident: bool | None = None) -> PreTrainedModel:
    """Open the trained model that a run starts from as a model whose layers load their weights when they run.

    Raises:
        CheckpointError: The model cannot be read.
    """
    tensors, config = start_model(start)
    return specialise(streamed_model(tensors, config, dtype=default_dtype(device), device=device, resident=resident))


def evaluate_unseen(
    model: PreTrainedModel, documents: Documents, *, prefix: int, sequence_length: int
) -> dict[str, Any]:
    """Measure one model on text that it was never trained on.

    Args:
        model: The model, on its device.
        documents: Documents to measure on.
        prefix: The token before each document.
        sequence_length: Maximum positions of a window.

    Returns:
        The figures of `Score.to_dict`, and `sources`: the same figures per source, with `source`, in the documents'
        order.
    """
    nats_N = document_nats(
        model, documents.tokens, prefix=prefix, sequence_length=sequence_length, loss_masks=documents.loss_masks
    )
    scores = document_scores(documents, nats_N)
    source_N = np.array(documents.sources)
    return {
        **sum(scores, Score()).to_dict(),
        "sources": [
            {"source": source, **_total(scores, source_N == source).to_dict()}
            for source in dict.fromkeys(documents.sources)
        ],
    }


def evaluate_ensemble(
    submodels: Sequence[Path],
    documents: Documents,
    labels_N: NDArray[np.integer[Any]] | None,
    distances: Distances,
    *,
    prefix: int,
    sequence_length: int,
    device: str = "cpu",
    batch_tokens: int = BATCH_TOKENS,
    resident: bool | None = None,
    advance: Advance = no_advance,
) -> dict[str, Any]:
    """Measure the sub-models as an ensemble; one decoder layer is in memory at a time.

    Args:
        submodels: Directories of the sub-models, in the clusters' order.
        documents: Documents to measure on.
        labels_N: Cluster of each document; None to leave out the figures per cluster.
        distances: Squared distances between contexts and the clusters' centres.
        prefix: The token before each document.
        sequence_length: Length of a training sequence.
        device: Device to run the model on.
        batch_tokens: Maximum positions of a forward pass.
        resident: Whether weights stay loaded; None if they do where the model is small.
        advance: Receives the number of tokens measured with each sub-model.

    Returns:
        The figures of `Score.to_dict`, and `clusters` and `sources`: the same figures per cluster and source, as in
        `evaluate`.
    """

    def nats() -> Iterator[list[NDArray[np.float64]]]:
        for directory in submodels:
            model = specialise(open_streamed(directory, dtype=default_dtype(device), device=device, resident=resident))
            yield token_nats(
                model,
                documents.tokens,
                prefix=prefix,
                sequence_length=sequence_length,
                batch_tokens=batch_tokens,
                advance=advance,
            )

    source_N, sources = _source_codes(documents)
    cluster_N, clusters = _cluster_codes(documents, labels_N)
    scores = document_scores(documents, ensemble_nats(documents, nats(), distances))
    return _by_group(scores, cluster_N, clusters, source_N, sources)


def _by_group(
    scores: Sequence[Score],
    cluster_N: NDArray[np.int64],
    clusters: list[int],
    source_N: NDArray[np.int64],
    sources: list[str],
) -> dict[str, Any]:
    return {
        **sum(scores, Score()).to_dict(),
        "clusters": [
            {"cluster": cluster, **_total(scores, cluster_N == i).to_dict()} for i, cluster in enumerate(clusters)
        ],
        "sources": [{"source": source, **_total(scores, source_N == i).to_dict()} for i, source in enumerate(sources)],
    }


def _cluster_codes(
    documents: Documents, labels_N: NDArray[np.integer[Any]] | None
) -> tuple[NDArray[np.int64], list[int]]:
    if labels_N is None:
        return np.zeros(len(documents), dtype=np.int64), []
    clusters = [int(label) for label in np.unique(labels_N)]
    return np.searchsorted(clusters, labels_N), clusters


def _source_codes(documents: Documents) -> tuple[NDArray[np.int64], list[str]]:
    # A single source without a name would only repeat the overall figures.
    sources = sorted(set(documents.sources))
    if len(sources) == 1 and re.fullmatch(r"source-\d+", sources[0]):
        return np.zeros(len(documents), dtype=np.int64), []
    return np.array([sources.index(source) for source in documents.sources], dtype=np.int64), sources


def _total(scores: Sequence[Score], mask_N: NDArray[np.bool_]) -> Score:
    return sum((scores[int(i)] for i in np.flatnonzero(mask_N)), Score())


def _similarity(model_dir: Path) -> dict[int, float]:
    checkpoint = open_checkpoint(model_dir)
    return expert_similarity(checkpoint, checkpoint.model_map)


def _routers(
    statistics: RouterStatistics,
    cluster_N: NDArray[np.int64],
    clusters: list[int],
    source_N: NDArray[np.int64],
    sources: list[str],
    *,
    similarity: Mapping[int, float],
) -> dict[str, Any]:
    # A group is a (source, cluster) pair: split the axis in two, then sum over one of them.
    routers, _, experts = statistics.selections_RGE.shape
    shape = (routers, max(1, len(sources)), max(1, len(clusters)), experts)
    selections_RSCE = statistics.selections_RGE.reshape(shape)
    top1_RSCE = statistics.top1_RGE.reshape(shape)
    load_RE = expert_load(selections_RSCE.sum(axis=(1, 2)))
    load_CE = expert_load(selections_RSCE.sum(axis=1)).mean(axis=0)
    load_SE = expert_load(selections_RSCE.sum(axis=2)).mean(axis=0)
    expert_RN = statistics.document_top1_RNE.argmax(axis=2)
    return {
        "routers": [
            {
                "layer": layer,
                "load": load_RE[r].tolist(),
                "dead": dead_experts(load_RE[r]),
                "token_entropy": float(statistics.token_entropy_R[r]),
                "load_entropy": entropy(load_RE[r]),
                "similarity": similarity.get(layer),
                "nmi_cluster": normalized_mutual_information(top1_RSCE[r].sum(axis=0)) if clusters else None,
                "nmi_source": normalized_mutual_information(top1_RSCE[r].sum(axis=1)) if sources else None,
            }
            for r, layer in enumerate(statistics.layers)
        ],
        "load_by_cluster": load_CE.tolist() if clusters else [],
        "load_by_source": dict(zip(sources, load_SE.tolist(), strict=True)) if sources else {},
        "specialisation": {
            "cluster": _document_nmi(cluster_N, expert_RN, experts) if clusters else None,
            "source": _document_nmi(source_N, expert_RN, experts) if sources else None,
        },
    }


def _document_nmi(label_N: NDArray[np.int64], expert_RN: NDArray[np.int64], experts: int) -> float:
    rows = int(label_N.max()) + 1
    counts = [np.bincount(label_N * experts + expert_N, minlength=rows * experts) for expert_N in expert_RN]
    return float(np.mean([normalized_mutual_information(each.reshape(rows, experts)) for each in counts]))
