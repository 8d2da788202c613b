"""Cost of the clusters: if documents' vectors are hidden states, the seed reads the documents.

Stored are the packed tokens of all clusters and, if the vectors are hidden states, 4 bytes per dimension of each
document.
"""

from __future__ import annotations

from collections.abc import Iterator

from moedisco_ray.core.limits import CLUSTERED, TEXT_BYTES_PER_TOKEN
from moedisco_ray.plan.files import Files, StageStorage
from moedisco_ray.plan.host_memory import ID_BYTES, cluster_memory
from moedisco_ray.plan.reading import Reading, StageEstimate, total
from moedisco_ray.plan.stage_cost import StageCost, Work
from moedisco_ray.plan.stage_memory import Streams


def _estimate(reading: Reading) -> StageEstimate:
    config, pool = reading.config, reading.config.vectors_pool
    if not config.tokens.decoupled:
        return reading.on_head("cluster", 0.0)
    if pool is None:
        return reading.on_head("cluster", reading.starting(None))
    text = reading.passes(round(CLUSTERED * config.tokens.submodels), whole=reading.vectors_of_whole, pool=pool)
    workers = min(pool.max_workers, config.cluster_count)
    return reading.divided("cluster", pool, total([text, reading.starting(pool)]), workers)


def _storage(files: Files) -> StageStorage | None:
    config = files.config
    if not config.tokens.decoupled:
        return None
    vectors, device, host = 0, 0, 0
    if config.vectors_pool is not None:
        device, host = files.device_and_host("cluster")
        vectors = 4 * config.model.architecture.hidden_size * -(-files.corpus_tokens // config.corpus.sequence_length)
    packed = files.token_bytes * round(CLUSTERED * config.tokens.submodels)
    documents = (TEXT_BYTES_PER_TOKEN + ID_BYTES) * files.corpus_tokens
    return StageStorage(
        stage="cluster",
        pool="cpu",
        stored=packed + vectors,
        device_memory=device,
        worker_memory=host + cluster_memory(config, files.corpus_tokens, files.vocab_size),
        node_disk=documents + packed + vectors,
        moved=2 * documents + packed + 2 * vectors,
    )


def _works(streams: Streams) -> Iterator[Work]:
    pool = streams.embedding_pool
    if pool is not None:
        yield Work(
            "cluster",
            pool,
            "clusters.vectors",
            streams.config.tokens.total,
            lambda tokens: streams.vectors(pool, tokens),
            remedy="clusters.vectors=tfidf_svd",
        )


COST = StageCost(_estimate, _storage, _works)
