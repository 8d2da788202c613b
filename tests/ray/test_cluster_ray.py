"""The cluster stage on Ray gives the bits of the one in this process."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from clustering_corpus import run_config, write_corpus, write_model

from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.metering import Meter
from moedisco_ray.core.stop_file import NEVER
from moedisco_ray.execution.ray.clustering import RayWorkers, build_clusters
from moedisco_ray.execution.ray.seats import Seats
from moedisco_ray.execution.ray.tasks import Slot
from moedisco_ray.stages.clustering.build import LocalWorkers
from moedisco_ray.stages.clustering.build import build_clusters as build_here
from moedisco_ray.stages.clustering.grid import Grid, peak
from moedisco_ray.stages.clustering.kmeans import fit_kmeans, fit_kmeans_on_blocks, reduce

pytestmark = [
    pytest.mark.ray, pytest.mark.usefixtures("ray_cluster"),
]


@pytest.fixture
def one_thread():
    """Many threads round a sum in another order than one, which is what Ray gives its workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def files_under(directory):
    return {str(path.relative_to(directory)): path for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("method", "vectors", "parts"), [
    ("kmeans", "tfidf_svd", 4), ("kmeans", "hidden_state", 2), ("likelihood", "tfidf_svd", 3)])
def test_the_artifact_is_that_of_the_pure_path(method, vectors, parts, one_thread, tmp_path):
    corpus, model = write_corpus(tmp_path / "corpus", parts=parts), write_model(tmp_path / "model")
    config = run_config(method=method, vectors=vectors)
    here, there = tmp_path / "here", tmp_path / "there"
    pure = build_here(config, corpus, model, here, LocalWorkers())
    meter = Meter()
    with Seats("vectors") as seats:
        assert build_clusters(
            config, corpus_dir=corpus, model_dir=model, directory=there, emit=meter.update, stop=NEVER, seats=seats) == pure
        assert seats.idle("low_mem_gpu") == (2 if vectors == "hidden_state" else 0)     # as many as there are slots and parts
    assert meter.worker_seconds.keys() == ({"low_memory"} if vectors == "hidden_state" else set())
    assert not meter.open
    ours, theirs = files_under(here), files_under(there)
    assert ours.keys() == theirs.keys()
    for name, path in ours.items():
        if name.endswith(".npz"):
            with np.load(path) as a, np.load(theirs[name]) as b:
                assert all(np.array_equal(a[key], b[key]) for key in a)
        elif name.endswith(".parquet"):
            assert pq.read_table(path).equals(pq.read_table(theirs[name])), name
        else:
            assert path.read_bytes() == theirs[name].read_bytes(), name


@pytest.mark.parametrize("shards", [1, 3])
def test_lloyd_on_ray_is_lloyd_here_even_when_a_shard_dies(shards, tmp_path):
    generator = np.random.default_rng(0)
    x_ND = generator.normal(size=(3000, 8)).astype(np.float32)
    ids = [i.to_bytes(16, "big") for i in range(3000)]
    files = []
    for f, rows in enumerate(np.array_split(generator.permutation(3000), 5)):
        files.append(tmp_path / f"{f}.parquet")
        write_vectors(files[-1], [ids[i] for i in rows], x_ND[rows])
    pure = fit_kmeans_on_blocks(np.array_split(x_ND, 7), x_ND[:500], 4, restarts=2, iterations=15)
    workers = RayWorkers(Slot(None, Meter().update, NEVER), max_actors=shards)
    workers.hold(files)
    origin_D = x_ND[:500].mean(axis=0, dtype=np.float64).astype(np.float32)
    grid = Grid.covering(origin_D, max(workers.ask("peak", None, origin_D)), 3000)
    assert max(workers.ask("peak", None, origin_D)) == peak(x_ND, origin_D)
    steps = 0

    def step(centroids_RKD, running):
        nonlocal steps
        steps += 1
        if steps == 3:
            ray.kill(workers._actors[0], no_restart=False)
        return reduce(workers.ask("step", None, grid, centroids_RKD, running))

    on_ray = fit_kmeans(step, x_ND[:500], grid, 4, restarts=2, iterations=15, seed=0)
    workers.release()
    assert steps > 3
    np.testing.assert_array_equal(on_ray.centroids_KD, pure.centroids_KD)
    assert on_ray.inertias == pure.inertias


def test_fewer_documents_than_clusters_is_told(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=5, parts=1)
    with pytest.raises(CorpusError, match=r"clusters.count"):
        build_clusters(
            run_config(count=6), corpus_dir=corpus, model_dir=tmp_path, directory=tmp_path, emit=Meter().update, stop=NEVER,
            seats=Seats("vectors"))


def write_vectors(path, ids, x_ND):
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(x_ND.ravel()), x_ND.shape[1])
    weights = np.ones(len(ids), np.int64)
    pq.write_table(pa.table({"id": pa.array(ids, pa.binary(16)), "weight": weights, "vector": vectors}), path)
