"""The whole cluster stage. `Workers`, in this process or on Ray, carry out every step that touches all documents.

The corpus is stored in parts, one file each. Tasks vectorise, count, assign and pack the documents; each task handles
one part. The driver fits k-means and the balancing prices on the first documents by id, which are a random sample
because ids are hashes. It holds samples of fixed size and a few kilobytes per part and cluster, so its memory does not
depend on the number of documents.

Shapes: S documents of the sample, D dimensions, E clusters, P sources.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moedisco_ray.core.config import Clusters, RunConfig
from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.limits import BALANCE_DOCUMENTS, CENTROID_DOCUMENTS, CLUSTERED, SAMPLED_DOCUMENTS
from moedisco_ray.core.records.events import Emit, StageProgress, discard
from moedisco_ray.core.records.findings import cluster_warnings
from moedisco_ray.core.store.artifacts import write_json
from moedisco_ray.core.store.run_store import SHARED, RunStore
from moedisco_ray.packed_tokens import Piece, write_index
from moedisco_ray.stages.clustering.balance import Assignment, Loads, fit_assignment
from moedisco_ray.stages.clustering.distances import Array
from moedisco_ray.stages.clustering.kmeans import RESTARTS, Fit, fit_kmeans
from moedisco_ray.stages.clustering.model import ClusterModel
from moedisco_ray.stages.clustering.packing import LOADS, CountLoads, Packed, PackParts, Part, ReadAssigned, loads_in
from moedisco_ray.stages.clustering.report import Sample, cluster_report
from moedisco_ray.stages.clustering.store import embed_parts, first_costs, first_vectors, token_arrays, weights
from moedisco_ray.stages.clustering.vectors import FitInputs, adjust, kind
from moedisco_ray.stages.tables import Engine, in_process
from moedisco_ray.stages.text.tokenizer import Encoder


class Workers(Protocol):
    """Carries out the steps of clustering that touch every document."""

    @property
    def engine(self) -> Engine:
        """Reads, counts and packs documents, without a slot."""

    def embed(self, parts: Sequence[Path], vectoriser: Path, directory: Path, progress: StageProgress) -> None:
        """Write a vector file (see `store`) of each part into `directory`, under the part's name.

        Documents are counted in `progress`.
        """


class LocalWorkers:
    """Workers that run in this process.

    Args:
        held: Returns a context manager that is open while documents are embedded, such as one that meters
            worker-seconds.
    """

    def __init__(self, held: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext) -> None:
        self._held = held
        self.engine = in_process(Path())

    def embed(self, parts: Sequence[Path], vectoriser: Path, directory: Path, progress: StageProgress) -> None:
        """Write one vector file per part."""
        with self._held():
            embed_parts(parts, vectoriser, directory, lambda event: progress.add(event.data["done"]))


def build_clusters(
    config: RunConfig,
    corpus_dir: Path,
    model_dir: Path,
    directory: Path,
    workers: Workers,
    *,
    emit: Emit = discard,
    balance_documents: int = BALANCE_DOCUMENTS,
    store: RunStore | None = None,
) -> dict[str, Any]:
    """Cluster the training documents and write the artifact: model, assignments, packed tokens, report.

    Only the documents that the sub-models need, and a margin, are clustered; see `documents_needed`.

    Args:
        config: The run's configuration.
        corpus_dir: The corpus artifact.
        model_dir: The seed model, which `mean_token` and `hidden_state` read.
        directory: Directory of the artifact; must exist.
        workers: Workers that carry out the steps that touch every document.
        emit: Receives `stage_progress` events.
        balance_documents: Number of documents on which the balancing prices of the clusters are fitted.
        store: The run; by default, that of the configuration.

    Returns:
        Figures of the stage: `clusters` (`documents` and `tokens` of each), `inertia` and `iterations` (None unless the
        method is k-means), `silhouette`, `nmi`, `balance`, and `warnings` (sentences).

    Raises:
        CorpusError: The corpus has fewer training documents than clusters.
    """
    store = store or RunStore.of(config.location)
    store.fetch(corpus_dir / "tokenizer", *(store.files(model_dir) if reads_model(config.clusters) else ()))
    parts = store.files(corpus_dir / "train", ".parquet")
    documents = documents_needed(config, parts, store)
    if documents < config.cluster_count:
        raise CorpusError(
            "clusters.count",
            config.cluster_count,
            f"the corpus has {documents} training documents; lower it or add text",
        )
    with _first_parts(parts, documents, directory / "documents.scratch", store) as chosen:
        stage = _Stage(
            config,
            corpus_dir=corpus_dir,
            model_dir=model_dir,
            directory=directory,
            workers=workers,
            emit=emit,
            balance_documents=balance_documents,
            store=store,
        )
        return stage.build(chosen, documents)


def reads_model(settings: Clusters) -> bool:
    """Whether clustering reads the weights of the seed model, or of the checkpoint that the run starts from."""
    return settings.vectors != "tfidf_svd"  # the report of random clusters shows mean tokens


def documents_needed(config: RunConfig, parts: Sequence[Path], store: RunStore = SHARED) -> int:
    """Number of documents to cluster: the first by id that hold enough text for sub-models and a margin, or all."""
    tokens, count = int(CLUSTERED * config.tokens.submodels), 0
    for path in parts:
        if tokens <= 0 and count >= config.cluster_count:
            break
        weights_N = weights(_columns(store, path, ("packed", "copies")))
        enough = int(np.searchsorted(np.cumsum(weights_N), tokens)) + 1
        count += min(len(weights_N), max(enough, config.cluster_count - count))
        tokens -= int(weights_N.sum())
    return count


@contextlib.contextmanager
def _first_parts(parts: Sequence[Path], count: int, scratch: Path, store: RunStore) -> Iterator[list[Path]]:
    """Files with exactly the first `count` documents: whole parts, and a shortened copy of the last in `scratch`."""
    scratch.mkdir(parents=True, exist_ok=True)
    chosen: list[Path] = []
    for path in parts:
        if not count:
            break
        rows = _rows(store, path)
        if count < rows:
            store.fetch(*([] if store.is_remote else [path]))  # the copy has no checksum
            pq.write_table(store.read_in_place(path, pq.read_table).slice(0, count), scratch / path.name)
        if rows:
            chosen.append(path if count >= rows else scratch / path.name)
        count -= min(count, rows)
    try:
        yield chosen
    finally:
        store.remove(scratch)


@dataclasses.dataclass(frozen=True)
class _Stage:
    config: RunConfig
    corpus_dir: Path
    model_dir: Path
    directory: Path
    workers: Workers
    emit: Emit
    balance_documents: int
    store: RunStore

    def build(self, parts: Sequence[Path], documents: int) -> dict[str, Any]:
        """Cluster all documents of the parts and write the artifact."""
        config, settings, workers = self.config, self.config.clusters, self.workers
        sampled = first_documents(parts, max(SAMPLED_DOCUMENTS, settings.number), self.store)
        inputs = FitInputs(
            texts=sampled["text"].to_pylist(),
            tokens=token_arrays(sampled),
            model_dir=self.model_dir,
            max_tokens=config.corpus.sequence_length,
            settings=settings,
            seed=config.seed,
        )
        by_distance = settings.vectors != "random"
        vectoriser = kind(settings.vectors).fit(inputs)
        model_path, scratch = self.directory / "cluster_model", self.directory / "vectors.scratch"
        try:
            for path in (model_path, scratch, self.directory / "assignments"):
                path.mkdir(parents=True, exist_ok=True)
            vectoriser.save(model_path)
            self.store.publish(model_path, *(path for path in parts if path.is_relative_to(self.directory)))
            workers.embed(parts, model_path, scratch, StageProgress(self.emit, "cluster", "vectors", documents))
            vectors = [(scratch / path.name).absolute() for path in parts]
            numbered = [Part(i, path.absolute(), vectors[i]) for i, path in enumerate(parts)]
            if by_distance:
                wanted = max(len(sampled), CENTROID_DOCUMENTS * settings.number)
                raw_SD = first_vectors(self._fetched(vectors, parts, wanted), wanted)
                vectoriser.centre(raw_SD[: len(sampled)])
                x_SD = adjust(raw_SD, vectoriser.centre_D)
                fit = self._fit_kmeans(x_SD)
                x_SD = x_SD[: len(sampled)]
            else:
                x_SD, fit = kind("mean_token").fit(inputs).embed(inputs.texts, inputs.tokens), None
            centroids_ED = fit.centroids_KD if fit else None
            wanted = min(self.balance_documents, documents)
            costs = first_costs(self._fetched(vectors, parts, wanted), wanted, vectoriser.centre_D, centroids_ED)
            rule, loads = fit_assignment(
                costs,
                functools.partial(self._loads, numbered),
                vectoriser.centre_D,
                centroids_ED,
                documents=documents,
                capacity=settings.capacity,
            )
            ClusterModel(vectoriser, centroids_ED, rule.prices_E).save(model_path)
            packed, indices = self._pack(numbered, rule)
        finally:
            self.store.remove(scratch)
        assignments = [self.directory / "assignments" / path.name for path in parts]
        clusters_S = _first_clusters(self._fetched(assignments, parts, len(sampled)), len(sampled))
        sample = Sample(inputs.texts, sampled["source"].to_pylist(), x_SD, clusters_S)
        report = cluster_report(sample, centroids_ED, tokens_E=loads.tokens_E, documents_PE=_by_source(packed))
        return self._write_report(report, fit, x_SD.shape[1], indices)

    def _pack(self, parts: Sequence[Part], rule: Assignment) -> tuple[list[Packed], list[dict[str, Any]]]:
        """Assign the documents of every part to clusters and pack their tokens.

        Returns:
            What was packed from each part, and the index of each cluster's packed tokens.
        """
        directory, tokenizer = self.directory.absolute(), self.corpus_dir.absolute() / "tokenizer"
        pack = PackParts(
            clusters=len(rule.prices_E),
            names=tuple(part.documents.name for part in parts),
            directory=directory,
            tokenizer=tokenizer,
            length=self.config.corpus.sequence_length,
            store=self.store,
        )
        written = self.workers.engine(parts, ReadAssigned(rule, self.store)).written(pack)
        packed = sorted(written, key=lambda part: part.number)
        vocab_size = Encoder(tokenizer).vocab_size
        shards = [directory / "shards" / str(k) for k in range(pack.clusters)]
        for path in shards:
            path.mkdir(parents=True, exist_ok=True)  # it is missing if other machines have written all pieces
        indices = [
            write_index(path, _pieces_of_cluster(packed, k), vocab_size, pack.length) for k, path in enumerate(shards)
        ]
        return packed, indices

    def _loads(self, parts: Sequence[Part], rule: Assignment) -> Loads:
        """Numbers of documents and tokens in each cluster under a rule, over all parts."""
        counted = self.workers.engine(parts, CountLoads(rule, self.store)).collected(LOADS)
        return loads_in(counted, len(rule.prices_E))

    def _fetched(self, files: Sequence[Path], parts: Sequence[Path], count: int) -> Sequence[Path]:
        """Fetch and return the files with the first `count` documents; a local run gets all files without a fetch."""
        if not self.store.is_remote:
            return files
        rows = np.cumsum([_rows(self.store, path) for path in parts])
        first = files[: int(np.searchsorted(rows, count)) + 1]
        self.store.fetch(*first)
        return first

    def _fit_kmeans(self, x_ND: Array) -> Fit:
        progress = StageProgress(self.emit, "cluster", "k-means restarts", RESTARTS)
        return fit_kmeans(x_ND, self.config.cluster_count, seed=self.config.seed, on_restart=lambda: progress.add(1))

    def _write_report(
        self, report: dict[str, Any], fit: Fit | None, dimensions: int, indices: Sequence[dict[str, Any]]
    ) -> dict[str, Any]:
        report |= {
            "vectors": self.config.clusters.vectors,
            "dimensions": dimensions,
            "inertia": fit.inertia if fit else None,
            "inertias": list(fit.inertias) if fit else [],
            "iterations": fit.iterations if fit else None,
            "shard_tokens": [index["tokens"] for index in indices],
        }
        report["warnings"] = cluster_warnings([entry["documents"] for entry in report["clusters"]])
        write_json(self.directory / "report.json", report)
        figures = {key: report[key] for key in ("inertia", "iterations", "silhouette", "nmi", "balance", "warnings")}
        sizes = [{"documents": entry["documents"], "tokens": entry["tokens"]} for entry in report["clusters"]]
        return {"clusters": sizes, **figures}


def _pieces_of_cluster(packed: Iterable[Packed], cluster: int) -> Iterator[Piece]:
    for part in packed:
        yield from part.pieces[cluster]


def first_documents(parts: Sequence[Path], count: int, store: RunStore = SHARED) -> pa.Table:
    """The first `count` documents by id; `parts` and their rows must be in ascending order of id.

    An id is a hash of the text, so this is a random sample that does not depend on the order of reading.
    """
    tables: list[pa.Table] = []
    for path in parts:
        tables.append(_columns(store, path, ("id", "source", "text", "tokens", "packed", "copies")))
        if sum(map(len, tables)) >= count:
            break
    return pa.concat_tables(tables).slice(0, count)


def _columns(store: RunStore, path: Path, names: Sequence[str]) -> pa.Table:
    return store.read_in_place(path, functools.partial(pq.read_table, columns=list(names)))


def _rows(store: RunStore, path: Path) -> int:
    return int(store.read_in_place(path, pq.read_metadata).num_rows)


def _first_clusters(assignments: Sequence[Path], count: int) -> Array:
    """Cluster of each of the first `count` documents, int64 [count]."""
    found: list[Array] = []
    for path in assignments:
        found.append(pq.read_table(path, columns=["cluster"])["cluster"].to_numpy().astype(np.int64))
        if sum(map(len, found)) >= count:
            break
    return np.concatenate(found)[:count]


def _by_source(packed: Sequence[Packed]) -> Array:
    """Number of documents of each source in each cluster, int64 [P, E]; sources in order of first documents."""
    found: dict[str, Array] = {}
    for part in packed:
        for name, documents_E in zip(part.sources, part.documents_PE, strict=True):
            found[name] = found.get(name, 0) + documents_E
    return np.stack(list(found.values()))
