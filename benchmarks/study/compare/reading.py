"""Counts the tokens that a run reads outside its training, from its artifacts or, before it ran, from its corpus.

Vectors by `mean_token`, `tfidf_svd` or `random`, and k-means itself, cost almost nothing on a CPU and are not counted.

Shapes: N documents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from benchmarks.study.compare.accounting import Reader, ReadingStage, Reads
from benchmarks.study.compare.records import Measured
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import RunDirError
from moedisco_ray.core.limits import ENSEMBLE_BLOCK
from moedisco_ray.core.records.summaries import EvaluationRecord, Figures
from moedisco_ray.core.store.artifacts import read_json, read_manifest
from moedisco_ray.packed_tokens import INDEX
from moedisco_ray.stages.calibration_text import calibration_windows, sample_windows
from moedisco_ray.stages.clustering.build import documents_needed
from moedisco_ray.stages.clustering.vectors.base import read_settings
from moedisco_ray.stages.text.validation import load_documents, validation_parts

Lengths = NDArray[np.int64]


def actual_reads(config: RunConfig, measured: Measured) -> Reads:
    """Tokens that a finished run has read outside its training.

    Args:
        config: Configuration of the run.
        measured: Model that is the arm's result.

    Raises:
        RunDirError: An artifact is missing.
    """
    directory = config.directory
    reads: dict[ReadingStage, dict[Reader, float]] = {}
    if config.tokens.decoupled:
        vectors = read_settings(directory / "clusters" / "cluster_model")
        clustered = sum(
            pq.read_metadata(path).num_rows for path in (directory / "clusters" / "assignments").glob("*.parquet")
        )
        lengths_N = _train_lengths(directory / "corpus")[:clustered]
        reads["cluster"] = _clustering(config, lengths_N, vectors["kind"], vectors.get("max_tokens", 0))
    if _merges(config, measured):
        reads["merge"] = _found_merge(config)
    reads["evaluate"] = _evaluation(config, directory / "corpus", measured, evaluated(directory, measured).tokens)
    return reads


def evaluated(directory: Path, measured: Measured) -> Figures:
    """Validation figures of the model that is the arm's result, from its run directory."""
    evaluation = EvaluationRecord.model_validate(read_json(directory / "evaluation" / "evaluation.json"))
    return evaluation.ensemble or Figures() if measured == "ensemble" else evaluation


def expected_reads(config: RunConfig, measured: Measured, corpus: Path) -> Reads:
    """Tokens that a run will read outside its training, if clusters have equal size.

    Unequal clusters change them by a few calibration windows.

    Args:
        config: Configuration of the run.
        measured: Model that will be the arm's result.
        corpus: Corpus artifact of another run on the same text.
    """
    settings, reads = config.clusters, dict[ReadingStage, dict[Reader, float]]()
    if config.tokens.decoupled:
        clustered = documents_needed(config, _train_parts(corpus))
        reads["cluster"] = _clustering(
            config, _train_lengths(corpus)[:clustered], settings.vectors, config.corpus.sequence_length
        )
    if _merges(config, measured):
        tokens = _packed(corpus / "shards")
        if config.tokens.decoupled:
            equal = [tokens // settings.number] * settings.number
            reads["merge"] = _merge(config, equal, equal)
        else:
            reads["merge"] = _upcycling(config, tokens)
    evaluated = sum(map(len, load_documents(validation_parts(corpus), config.evaluation.max_tokens).tokens))
    reads["evaluate"] = _evaluation(config, corpus, measured, evaluated)
    return reads


def _merges(config: RunConfig, measured: Measured) -> bool:
    """Whether the arm's result comes from a merge or from upcycling; an ensemble does not."""
    return measured != "ensemble" and (config.tokens.decoupled or config.tokens.seed > 0)


def _clustering(config: RunConfig, lengths_N: Lengths, kind: str, limit: int) -> dict[Reader, float]:
    """Each clustered document once."""
    if kind == "hidden_state":
        return {_vector_model(config): float(np.minimum(lengths_N, limit).sum())}
    return {}


def _found_merge(config: RunConfig) -> dict[Reader, float]:
    directory = config.directory
    if not config.tokens.decoupled:
        return _upcycling(config, _packed(directory / "corpus" / "shards"))
    clusters = _summary(directory / "clusters")["clusters"]
    packed = [_packed(directory / "clusters" / "shards" / str(k)) for k in range(len(clusters))]
    return _merge(config, [entry["tokens"] for entry in clusters], packed)


def _merge(config: RunConfig, tokens: Sequence[int], packed: Sequence[int]) -> dict[Reader, float]:
    """Tokens to calibrate the merged model's routers.

    Args:
        config: Configuration of the run.
        tokens: Tokens of each cluster, counted in its documents.
        packed: Packed tokens of each cluster.
    """
    length = config.corpus.sequence_length
    counts = calibration_windows(config.merge, length, tokens, [_windows(each, length) for each in packed])
    router = config.merge.method(from_moe=config.model.starts_from_moe)
    return {"whole_states": _passes(config, router) * length * sum(counts)}


def _upcycling(config: RunConfig, packed: int) -> dict[Reader, float]:
    length = config.corpus.sequence_length
    return {
        "whole_states": _passes(config, "kept")
        * length
        * sample_windows(config.merge, length, _windows(packed, length))
    }


def _passes(config: RunConfig, router: str) -> float:
    """Passes through the whole model that calibrate the routers: every layer twice, but the last of l layers once.

    0 if rows are kept unchanged and no scale has to be matched: the run then measures its routers, but the recipe does
    not need it.
    """
    whole = config.model.architecture
    if router == "kept" and (whole.norm_topk_prob or not config.merge.from_data(from_moe=config.model.starts_from_moe)):
        return 0.0
    return 2 - 1 / whole.num_hidden_layers


def _evaluation(config: RunConfig, corpus: Path, measured: Measured, tokens: int) -> dict[Reader, float]:
    """Validation tokens read by the final model, by the models before it, and by the one that finds clusters.

    In an ensemble each sub-model also reads them, and the model that weights the sub-models reads their context.
    """
    settings, ensemble = config.clusters, measured == "ensemble"
    reads = Counter[Reader]({"submodel": settings.number * tokens} if ensemble else {"whole": tokens})
    if config.evaluation.stages:
        reads["submodel"] += tokens * ((config.tokens.seed > 0) + config.tokens.decoupled)
        reads["whole"] += tokens * (config.tokens.decoupled and not ensemble)
    if config.measures_start:
        reads["whole" if config.model.starts_from_moe else "submodel"] += tokens
    if config.tokens.decoupled:
        documents = load_documents(validation_parts(corpus), config.evaluation.max_tokens).tokens
        asked_N = np.array([len(document) for document in documents])
        if ensemble:
            asked_N = np.concatenate(
                [asked_N, *(np.arange(ENSEMBLE_BLOCK, length, ENSEMBLE_BLOCK) for length in asked_N)]
            )
        if settings.vectors == "hidden_state":
            reads[_vector_model(config)] += int(np.minimum(asked_N, config.corpus.sequence_length).sum())
    return {reader: float(count) for reader, count in reads.items() if count}


def _vector_model(config: RunConfig) -> Reader:
    """Model whose hidden states are the documents' vectors: the seed, or the checkpoint from which the run started."""
    return "whole_states" if config.model.starts_from_moe else "submodel_states"


def _train_lengths(corpus: Path) -> Lengths:
    """Tokens of each training document, in ascending order of id."""
    lengths = [
        pc.list_value_length(pq.read_table(part, columns=["tokens"])["tokens"]).to_numpy()
        for part in _train_parts(corpus)
    ]
    return np.concatenate([np.empty(0, np.int64), *lengths]).astype(np.int64)


def _train_parts(corpus: Path) -> list[Path]:
    return sorted((corpus / "train").glob("part-*.parquet"))


def _packed(directory: Path) -> int:
    return int(read_json(directory / INDEX)["tokens"])


def _windows(tokens: int, length: int) -> int:
    return max(0, tokens - 1) // length


def _summary(directory: Path) -> dict[str, list[dict[str, int]]]:
    manifest = read_manifest(directory)
    if manifest is None:
        raise RunDirError("output", str(directory), "is not finished; run the same command again: it resumes")
    return manifest.summary
