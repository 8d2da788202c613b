"""Prices that are fitted on a sample and corrected by the loads of all documents."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clustering_corpus import run_config, write_corpus, write_model
from sklearn.metrics import normalized_mutual_info_score

from moedisco_ray.stages.clustering.assign import assign_balanced
from moedisco_ray.stages.clustering.balance import TOLERANCE, fit_assignment
from moedisco_ray.stages.clustering.build import LocalWorkers, build_clusters, nth_id
from moedisco_ray.stages.clustering.report import mutual_information
from moedisco_ray.stages.clustering.store import Shard


class Shards:
    """Several shards in this process, and a record of the sizes of their answers."""

    def __init__(self, files):
        self.shards = [Shard([path]) for path in files]
        self.sizes = []

    def ask(self, method, *args):
        answers = [getattr(shard, method)(*args) for shard in self.shards]
        self.sizes += [(method, sum(array.nbytes for array in answer)) for answer in answers]
        return answers


def write_vectors(directory, x_ND, weights_N, files, salt=0):
    """Vector files of documents with random ids; returns the files, and the sorted ids."""
    ids = [hashlib.blake2b(f"{salt} {i}".encode(), digest_size=16).digest() for i in range(len(x_ND))]
    paths = []
    for f, rows in enumerate(np.array_split(np.random.default_rng(1).permutation(len(ids)), files)):
        paths.append(directory / f"{files}-{f}.parquet")
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(x_ND[rows].ravel()), x_ND.shape[1])
        pq.write_table(pa.table({
            "id": pa.array([ids[i] for i in rows], pa.binary(16)), "weight": weights_N[rows], "vector": vectors}), paths[-1])
    return paths, sorted(ids)


def crowded(n, e, seed):
    """Costs and tokens of documents; most documents are nearest to the first clusters."""
    generator = np.random.default_rng(seed)
    return (generator.random((n, e)) + np.linspace(0, 1, e)).astype(np.float32), generator.integers(1, 200, n)


@pytest.mark.parametrize("seed", range(4))
def test_clusters_of_many_documents_keep_the_capacity_within_the_tolerance(seed, tmp_path):
    x_NE, weights_N = crowded(30_000, 8, seed)
    files, ids = write_vectors(tmp_path, x_NE, weights_N, 3)
    shards = Shards(files)
    rule, loads = fit_assignment(shards.ask, None, None, last=ids[999], documents=len(ids), capacity=1.05)
    assert loads.documents_E.sum() == len(ids)
    assert loads.tokens_E.sum() == weights_N.sum()
    assert loads.tokens_E.max() <= 1.05 * (1 + TOLERANCE) * weights_N.sum() / 8
    assert not len(rule.moved_M)
    passes = [size for method, size in shards.sizes if method == "loads"]
    assert len(passes) <= 6 * len(files)
    assert set(passes) == {2 * 8 * 8}     # two int64 per cluster, whatever the number of documents
    # The sample alone is not enough: its prices are off by its sampling error.
    assert len(passes) > len(files)
    # The cost is near that of balancing with all documents at hand.
    every_N, _ = assign_balanced(x_NE, weights_N, np.arange(len(ids)).astype("S16"), 1.05)
    clusters_N = (x_NE + rule.prices_E).argmin(axis=1)
    cost, least = (weights_N @ x_NE[np.arange(len(ids)), chosen] for chosen in (clusters_N, every_N))
    assert cost <= 1.001 * least


def test_the_rule_does_not_depend_on_the_files(tmp_path):
    x_NE, weights_N = crowded(5000, 4, 0)
    rules = []
    for count in (1, 4):
        files, ids = write_vectors(tmp_path, x_NE, weights_N, count)
        rule, loads = fit_assignment(Shards(files).ask, None, None, last=ids[499], documents=len(ids), capacity=1.05)
        rules.append((rule.prices_E.tolist(), loads.tokens_E.tolist(), loads.documents_E.tolist()))
    assert rules[0] == rules[1]


@pytest.mark.parametrize("capacity", [1.0, 1.05, None])
def test_few_documents_are_balanced_exactly(capacity, tmp_path):
    x_NE, weights_N = crowded(600, 4, 5)
    files, ids = write_vectors(tmp_path, x_NE, weights_N, 2)
    rule, loads = fit_assignment(Shards(files).ask, None, None, last=ids[-1], documents=len(ids), capacity=capacity)
    shard = Shard(files)
    expected_N, prices_E = assign_balanced(shard._x_ND, shard._weights_N, shard._ids_N, capacity)
    np.testing.assert_array_equal(rule.clusters(shard._ids_N, shard._x_ND), expected_N)
    np.testing.assert_array_equal(rule.prices_E, prices_E)
    np.testing.assert_array_equal(loads.tokens_E, np.bincount(expected_N, shard._weights_N, minlength=4))


def test_documents_that_are_all_alike_end_the_corrections(tmp_path):
    files, ids = write_vectors(tmp_path, np.zeros((400, 3), np.float32), np.ones(400, np.int64), 1)
    shards = Shards(files)
    _, loads = fit_assignment(shards.ask, None, None, last=ids[99], documents=400, capacity=1.05)
    assert loads.documents_E.sum() == 400
    assert sum(method == "loads" for method, _ in shards.sizes) == 1


@pytest.mark.parametrize("vectors", ["tfidf_svd", "mean_token"])
def test_the_stage_balances_documents_beyond_the_sample(vectors, tmp_path):
    corpus, model = write_corpus(tmp_path / "corpus", documents=1500, parts=4), write_model(tmp_path / "model")
    summaries = []
    for name, documents in (("sampled", 200), ("whole", 1500)):
        (tmp_path / name).mkdir()
        config = run_config(vectors=vectors)
        summaries.append(build_clusters(
            config, corpus, model, tmp_path / name, LocalWorkers(), balance_documents=documents))
    sampled, whole = summaries
    assert sum(entry["documents"] for entry in sampled["clusters"]) == 1500
    assert sampled["balance"] <= 1.05 * 1.01      # a document is 1 % of a cluster's tenth part
    assert whole["balance"] <= 1.05
    labels = [
        np.concatenate([pq.read_table(path)["cluster"] for path in sorted((tmp_path / name / "assignments").iterdir())])
        for name in ("sampled", "whole")]
    assert (labels[0] == labels[1]).mean() > 0.9


def test_the_sample_ends_at_the_nth_id(tmp_path):
    corpus = write_corpus(tmp_path, parts=3)
    parts = sorted((corpus / "train").iterdir())
    ids = pa.concat_tables([pq.read_table(path) for path in parts])["id"].to_pylist()
    assert [nth_id(parts, n) for n in (1, 100, 240)] == [ids[0], ids[99], ids[239]]
    with pytest.raises(IndexError):
        nth_id(parts, 241)


@pytest.mark.parametrize("seed", range(5))
def test_mutual_information_from_counts_is_that_of_labels(seed):
    generator = np.random.default_rng(seed)
    sources_N, clusters_N = generator.integers(0, 4, 500), generator.integers(0, 5, 500)
    clusters_N = np.where(generator.random(500) < 0.5, sources_N, clusters_N)
    counts_PE = np.zeros((4, 7), np.int64)      # two clusters are empty
    np.add.at(counts_PE, (sources_N, clusters_N), 1)
    assert mutual_information(counts_PE) == normalized_mutual_info_score(sources_N, clusters_N)
