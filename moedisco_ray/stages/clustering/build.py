"""The whole cluster stage. `Workers`, in this process or on Ray, carry out every step that touches all documents.

The driver holds ids, weights and float32 costs of all N documents: 4 E + 32 bytes per document for E clusters, and about twice
that while it balances. With E = 8, 10 million documents take 1.3 GB. Vectors stay with the workers.

Shapes: N documents, S documents of the sample, D dimensions, E clusters.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moedisco_ray.core.artifacts import write_json
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.events import Emit, StageProgress, discard
from moedisco_ray.core.findings import cluster_warnings
from moedisco_ray.plan.estimate import CLUSTERED
from moedisco_ray.stages.clustering.assign import assign_balanced
from moedisco_ray.stages.clustering.blocks import Statistics, reduce
from moedisco_ray.stages.clustering.grid import Array, Grid
from moedisco_ray.stages.clustering.kmeans import ITERATIONS, Fit, fit_kmeans
from moedisco_ray.stages.clustering.model import ClusterModel
from moedisco_ray.stages.clustering.report import Sample, cluster_report
from moedisco_ray.stages.clustering.store import ID, Shard, embed_parts, id_array, token_arrays, weights
from moedisco_ray.stages.clustering.vectors import FitInputs, adjust, kind

Pack = Callable[[Sequence[Path], Sequence[Path], int, Path], dict[str, Any]]
"""Function of (parts, assignments, cluster number, directory) that packs the tokens of a cluster and returns their index."""


class Workers(Protocol):
    """Carries out the steps of clustering that touch every document."""

    def embed(self, parts: Sequence[Path], vectoriser: Path, directory: Path, progress: StageProgress) -> None:
        """Write vector files (see `store`) of all documents into `directory`, and count the documents in `progress`."""

    def hold(self, files: Sequence[Path]) -> None:
        """Load the vector files into one or more `store.Shard`s."""

    def ask(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every shard with the same arguments; return the results in any order."""

    def release(self) -> None:
        """Free the shards."""

    def pack(
        self, parts: Sequence[Path], assignments: Sequence[Path], count: int, directory: Path,
    ) -> list[dict[str, Any]]:
        """Pack every cluster k into `directory`/k; return the indices."""


class LocalWorkers:
    """Workers that run in this process.

    Args:
        pack: Function that packs one cluster.
        held: Returns a context manager around the embedding, such as one that meters its worker-seconds.
    """

    def __init__(self, pack: Pack, held: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext) -> None:
        self._pack = pack
        self._held = held
        self._shard: Shard | None = None

    def embed(self, parts: Sequence[Path], vectoriser: Path, directory: Path, progress: StageProgress) -> None:
        """Write one vector file per part."""
        with self._held():
            embed_parts(parts, vectoriser, directory, lambda event: progress.add(event.data["done"]))

    def hold(self, files: Sequence[Path]) -> None:
        """Load all files into one shard."""
        self._shard = Shard(files)

    def ask(self, method: str, *args: Any) -> list[Any]:
        """Call the method of the only shard."""
        return [getattr(self._shard, method)(*args)]

    def release(self) -> None:
        """Free the shard."""
        self._shard = None

    def pack(
        self, parts: Sequence[Path], assignments: Sequence[Path], count: int, directory: Path,
    ) -> list[dict[str, Any]]:
        """Pack one cluster after the other."""
        return [self._pack(parts, assignments, k, directory / str(k)) for k in range(count)]


def build_clusters(
    config: RunConfig, corpus_dir: Path, model_dir: Path, directory: Path, workers: Workers, *, emit: Emit = discard,
) -> dict[str, Any]:
    """Cluster the training documents that are needed and write the artifact: model, assignments, packed tokens, report.

    Args:
        config: The run's configuration.
        corpus_dir: The corpus artifact.
        model_dir: The seed model, which `mean_token` and `hidden_state` read.
        directory: Directory of the artifact; must exist.
        workers: Workers that carry out the steps that touch every document.
        emit: Receives `stage_progress` events.

    Returns:
        Figures of the stage: `clusters` (`documents` and `tokens` of each), `inertia` and `iterations` (None unless the
        method is k-means), `silhouette`, `nmi`, `balance`, and `warnings` (sentences).

    Raises:
        CorpusError: The corpus has fewer training documents than clusters.
    """
    parts = sorted((corpus_dir / "train").glob("part-*.parquet"))
    documents = documents_needed(config, parts)
    if documents < config.clusters.count:
        raise CorpusError(
            "clusters.count", config.clusters.count, f"the corpus has {documents} training documents; lower it or add text")
    with _first_parts(parts, documents, directory / "documents.scratch") as chosen:
        return _build(config, chosen, documents, model_dir=model_dir, directory=directory, workers=workers, emit=emit)


def documents_needed(config: RunConfig, parts: Sequence[Path]) -> int:
    """Number of documents to cluster, in order of id: enough text for the sub-models plus a margin, or all."""
    tokens, count = int(CLUSTERED * config.tokens.submodels), 0
    for path in parts:
        if tokens <= 0 and count >= config.clusters.count:
            break
        weights_N = weights(pq.read_table(path, columns=["packed", "copies"]))
        enough = int(np.searchsorted(np.cumsum(weights_N), tokens)) + 1
        count += min(len(weights_N), max(enough, config.clusters.count - count))
        tokens -= int(weights_N.sum())
    return count


@contextlib.contextmanager
def _first_parts(parts: Sequence[Path], count: int, scratch: Path) -> Iterator[list[Path]]:
    """Files with exactly the first `count` documents: whole parts, and a shortened copy of the last one in `scratch`."""
    scratch.mkdir(parents=True, exist_ok=True)
    chosen: list[Path] = []
    for path in parts:
        rows = pq.read_metadata(path).num_rows
        if count < rows:
            pq.write_table(pq.read_table(path).slice(0, count), scratch / path.name)
        if count:
            chosen.append(path if count >= rows else scratch / path.name)
        count -= min(count, rows)
    try:
        yield chosen
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _build(
    config: RunConfig, parts: Sequence[Path], documents: int, *, model_dir: Path, directory: Path, workers: Workers, emit: Emit,
) -> dict[str, Any]:
    settings = config.clusters
    sampled = first_documents(parts, max(settings.sample, settings.count))
    inputs = FitInputs(
        texts=sampled["text"].to_pylist(), tokens=token_arrays(sampled), weights_S=weights(sampled), ids_S=id_array(sampled["id"]),
        model_dir=model_dir, max_tokens=config.corpus.sequence_length, settings=settings, seed=config.seed)
    by_distance = settings.method == "kmeans"
    vectoriser = kind(settings.vectors if by_distance else settings.method).fit(inputs)
    model_path, scratch = directory / "cluster_model", directory / "vectors.scratch"
    try:
        for path in (model_path, scratch, directory / "assignments"):
            path.mkdir(parents=True, exist_ok=True)
        vectoriser.save(model_path)
        workers.embed(parts, model_path, scratch, StageProgress(emit, "cluster", "vectors", documents))
        workers.hold(sorted(scratch.glob("*.parquet")))
        if by_distance:
            raw_SD = _sample_vectors(workers, sampled["id"][-1].as_py())
            vectoriser.centre(raw_SD)
            x_SD = adjust(raw_SD, vectoriser.centre_D)
            iterations = StageProgress(emit, "cluster", "k-means iterations")
            fit = _fit(config, workers, vectoriser.centre_D, x_SD, iterations, documents=documents)
        else:
            x_SD, fit = kind("mean_token").fit(inputs).embed(inputs.texts, inputs.tokens), None
        centroids_ED = fit.centroids_KD if fit else None
        ids_N, weights_N, cost_NE = _costs(workers, vectoriser.centre_D, centroids_ED)
    finally:
        workers.release()
        shutil.rmtree(scratch, ignore_errors=True)
    clusters_N, prices_E = assign_balanced(cost_NE, weights_N, ids_N, settings.capacity)
    ClusterModel(vectoriser, centroids_ED, prices_E).save(model_path)
    assignments = write_assignments(parts, ids_N, clusters_N, directory / "assignments")
    indices = workers.pack(parts, assignments, settings.count, directory / "shards")
    sample = Sample(inputs.texts, sampled["source"].to_pylist(), x_SD, clusters_N[: len(sampled)])
    report = cluster_report(
        sample, centroids_ED, count=settings.count, clusters_N=clusters_N, weights_N=weights_N, sources_N=_source_codes(parts))
    report |= {
        "method": settings.method, "vectors": settings.vectors if by_distance else "mean_token", "dimensions": x_SD.shape[1],
        "inertia": fit.inertia if fit else None, "inertias": list(fit.inertias) if fit else [],
        "iterations": fit.iterations if fit else None, "shard_tokens": [index["tokens"] for index in indices]}
    report["warnings"] = cluster_warnings([entry["documents"] for entry in report["clusters"]])
    write_json(directory / "report.json", report)
    figures = {key: report[key] for key in ("inertia", "iterations", "silhouette", "nmi", "balance", "warnings")}
    sizes = [{key: entry[key] for key in ("documents", "tokens")} for entry in report["clusters"]]
    return {"clusters": sizes, **figures}


def first_documents(parts: Sequence[Path], count: int) -> pa.Table:
    """The first `count` documents by id; `parts` and their rows must be in ascending order of id.

    An id is a hash of the text, so this is a random sample that does not depend on the order of reading.
    """
    tables: list[pa.Table] = []
    for path in parts:
        tables.append(pq.read_table(path, columns=["id", "source", "text", "tokens", "packed", "copies"]))
        if sum(map(len, tables)) >= count:
            break
    return pa.concat_tables(tables).slice(0, count)


def write_assignments(parts: Sequence[Path], ids_N: Array, clusters_N: Array, directory: Path) -> list[Path]:
    """Write one file of assignments per part, with the same name and the same order of rows.

    Args:
        parts: Files of the corpus' documents, in ascending order of id.
        ids_N: Ids of the documents, in the same order.
        clusters_N: Cluster of each document.
        directory: Directory for the assignments.
    """
    paths, start = [], 0
    for part in parts:
        stop = start + pq.read_metadata(part).num_rows
        table = pa.table({
            "id": pa.array([value.ljust(16, b"\0") for value in ids_N[start:stop].tolist()], ID),
            "cluster": pa.array(clusters_N[start:stop].astype(np.int32))})
        pq.write_table(table, directory / part.name)
        paths.append(directory / part.name)
        start = stop
    return paths


def own_documents(assignments: Path, cluster: int) -> Array:
    """Mask of the documents of a part that belong to a cluster, bool [n]."""
    owned_N: Array = pq.read_table(assignments, columns=["cluster"])["cluster"].to_numpy() == cluster
    return owned_N


def _fit(
    config: RunConfig, workers: Workers, centre_D: Array | None, x_SD: Array, progress: StageProgress, *, documents: int,
) -> Fit:
    origin_D = x_SD.mean(axis=0, dtype=np.float64).astype(np.float32)
    grid = Grid.covering(origin_D, max(workers.ask("peak", centre_D, origin_D)), documents)

    def step(centroids_RKD: Array, running: Sequence[int]) -> Statistics:
        progress.add(1)
        return reduce(workers.ask("step", centre_D, grid, centroids_RKD, running))

    settings = config.clusters
    return fit_kmeans(
        step, x_SD, grid, settings.count, restarts=settings.restarts, iterations=ITERATIONS, seed=config.seed)


def _sample_vectors(workers: Workers, last: bytes) -> Array:
    ids, vectors = zip(*workers.ask("sample", last), strict=True)
    order = np.argsort(np.concatenate(ids), kind="stable")
    return np.concatenate(vectors)[order]


def _costs(workers: Workers, centre_D: Array | None, centroids_ED: Array | None) -> tuple[Array, Array, Array]:
    """Ids, weights and costs of all documents, in ascending order of id."""
    columns = [np.concatenate(column) for column in zip(*workers.ask("costs", centre_D, centroids_ED), strict=True)]
    order = np.argsort(columns[0], kind="stable")
    ids_N, weights_N, cost_NE = (column[order] for column in columns)
    return ids_N, weights_N, cost_NE


def _source_codes(parts: Sequence[Path]) -> Array:
    columns = [pq.read_table(path, columns=["source"])["source"] for path in parts]
    names = pa.chunked_array([chunk for column in columns for chunk in column.chunks])
    return names.dictionary_encode().unify_dictionaries().combine_chunks().indices.to_numpy()
