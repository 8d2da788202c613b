"""Prices that are fitted on a sample and corrected by the loads of all documents."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clustering_corpus import run_config, write_corpus, write_model
from sklearn.metrics import normalized_mutual_info_score

from moedisco_ray.core.store.run_store import SHARED
from moedisco_ray.stages.clustering.assign import assign_balanced
from moedisco_ray.stages.clustering.balance import TOLERANCE, Loads, fit_assignment
from moedisco_ray.stages.clustering.build import LocalWorkers, build_clusters
from moedisco_ray.stages.clustering.packing import CountLoads, Part, loads_in
from moedisco_ray.stages.clustering.report import mutual_information
from moedisco_ray.stages.clustering.store import (
    clusters_in,
    embed_parts,
    first_costs,
    first_vectors,
    read_vectors,
    token_arrays,
    weights,
)
from moedisco_ray.stages.clustering.vectors.random import RandomCosts


class Files:
    """Vector files of documents with random ids in ascending order, and the answers about them that the driver gets."""

    def __init__(self, directory, x_ND, weights_N, files):
        ids = [hashlib.blake2b(f"{i}".encode(), digest_size=16).digest() for i in range(len(x_ND))]
        order = np.array(sorted(range(len(ids)), key=lambda i: ids[i]))
        self.ids_N, self.x_ND, self.weights_N = np.array(ids, dtype="S16")[order], x_ND[order], weights_N[order]
        self.paths = []
        self.answers = []
        for f, rows in enumerate(np.array_split(order, files)):
            self.paths.append(directory / f"{files}-{f}.parquet")
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(x_ND[rows].ravel()), x_ND.shape[1])
            pq.write_table(
                pa.table(
                    {
                        "id": pa.array([ids[i] for i in rows], pa.binary(16)),
                        "weight": weights_N[rows],
                        "vector": vectors,
                    }
                ),
                self.paths[-1],
            )

    def loads(self, rule):
        count = CountLoads(rule, SHARED)
        tables = [pa.concat_tables(count(Part(i, path, path))) for i, path in enumerate(self.paths)]
        found = [loads_in(table, len(rule.prices_E)) for table in tables]
        self.answers += found
        return Loads(*np.sum(found, axis=0))

    def fit(self, sample, capacity=1.05):
        costs = first_costs(self.paths, sample, None, None)
        return fit_assignment(costs, self.loads, None, None, documents=len(self.ids_N), capacity=capacity)


def crowded(n, e, seed):
    """Costs and tokens of documents; most documents are nearest to the first clusters."""
    generator = np.random.default_rng(seed)
    return (generator.random((n, e)) + np.linspace(0, 1, e)).astype(np.float32), generator.integers(1, 200, n)


@pytest.mark.parametrize("seed", range(4))
def test_clusters_of_many_documents_keep_the_capacity_within_the_tolerance(seed, tmp_path):
    x_NE, weights_N = crowded(30_000, 8, seed)
    files = Files(tmp_path, x_NE, weights_N, 3)
    rule, loads = files.fit(3000)
    assert loads.documents_E.sum() == 30_000
    assert loads.tokens_E.sum() == weights_N.sum()
    assert loads.tokens_E.max() <= 1.05 * (1 + TOLERANCE) * weights_N.sum() / 8
    assert not len(rule.moved_M)
    assert len(files.answers) <= 6 * 3
    # Two int64 per cluster, whatever the number of documents.
    assert {answer.documents_E.nbytes + answer.tokens_E.nbytes for answer in files.answers} == {2 * 8 * 8}
    # The sample alone is not enough: its prices are off by its sampling error.
    assert len(files.answers) > 3
    # The cost is near that of balancing with all documents at hand.
    every_N, _ = assign_balanced(x_NE, weights_N, np.arange(30_000).astype("S16"), 1.05)
    clusters_N = (x_NE + rule.prices_E).argmin(axis=1)
    cost, least = (weights_N @ x_NE[np.arange(30_000), chosen] for chosen in (clusters_N, every_N))
    assert cost <= 1.001 * least


def test_the_rule_does_not_depend_on_the_files(tmp_path):
    x_NE, weights_N = crowded(5000, 4, 0)
    rules = []
    for count in (1, 4):
        rule, loads = Files(tmp_path, x_NE, weights_N, count).fit(500)
        rules.append((rule.prices_E.tolist(), loads.tokens_E.tolist(), loads.documents_E.tolist()))
    assert rules[0] == rules[1]


@pytest.mark.parametrize("capacity", [1.0, 1.05, None])
def test_few_documents_are_balanced_exactly(capacity, tmp_path):
    x_NE, weights_N = crowded(600, 4, 5)
    files = Files(tmp_path, x_NE, weights_N, 2)
    rule, loads = files.fit(600, capacity)
    expected_N, prices_E = assign_balanced(files.x_ND, files.weights_N, files.ids_N, capacity)
    np.testing.assert_array_equal(rule.clusters(files.ids_N, files.x_ND), expected_N)
    np.testing.assert_array_equal(np.concatenate([clusters_in(path, rule) for path in files.paths]), expected_N)
    np.testing.assert_array_equal(rule.prices_E, prices_E)
    np.testing.assert_array_equal(loads.tokens_E, np.bincount(expected_N, files.weights_N, minlength=4))


def test_documents_that_are_all_alike_end_the_corrections(tmp_path):
    files = Files(tmp_path, np.zeros((400, 3), np.float32), np.ones(400, np.int64), 1)
    _, loads = files.fit(100)
    assert loads.documents_E.sum() == 400
    assert len(files.answers) == 1


def labels_in(directory):
    files = sorted((directory / "assignments").iterdir())
    return np.concatenate([pq.read_table(path)["cluster"] for path in files])


@pytest.mark.parametrize("vectors", ["tfidf_svd", "mean_token"])
def test_the_stage_balances_documents_beyond_the_sample(vectors, tmp_path):
    corpus, model = write_corpus(tmp_path / "corpus", documents=1500, parts=4), write_model(tmp_path / "model")
    summaries = []
    for name, documents in (("sampled", 200), ("whole", 1500)):
        (tmp_path / name).mkdir()
        config = run_config(vectors=vectors)
        summaries.append(
            build_clusters(config, corpus, model, tmp_path / name, LocalWorkers(), balance_documents=documents)
        )
    sampled, whole = summaries
    assert sum(entry["documents"] for entry in sampled["clusters"]) == 1500
    assert sampled["balance"] <= 1.05 * 1.01  # a document is 1 % of a cluster's tenth part
    assert whole["balance"] <= 1.05
    same = labels_in(tmp_path / "sampled") == labels_in(tmp_path / "whole")
    assert same.mean() > 0.9


@pytest.mark.parametrize("rows", [1, 7, 8192])
def test_files_are_written_and_read_in_blocks(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("moedisco_ray.stages.clustering.store.ROWS", rows)
    corpus = write_corpus(tmp_path, documents=60, parts=3)
    parts = sorted((corpus / "train").iterdir())
    pq.write_table(pq.read_table(parts[1]).slice(0, 0), parts[1])  # a part may have validation documents alone
    documents = pa.concat_tables([pq.read_table(path) for path in parts])
    (tmp_path / "vectors").mkdir()
    vectoriser = RandomCosts(4, 0)
    vectoriser.save(tmp_path / "vectors")
    events = []
    embed_parts(parts, tmp_path / "vectors", tmp_path / "vectors", events.append)
    files = [tmp_path / "vectors" / path.name for path in parts]
    assert sorted(path.name for path in (tmp_path / "vectors").glob("part*")) == [path.name for path in parts]
    assert [event.data["done"] for event in events] == [pq.read_metadata(path).num_rows for path in parts]
    blocks = list(read_vectors(files))
    assert max(len(block.ids_N) for block in blocks) <= rows
    expected_ND = vectoriser.embed(documents["text"].to_pylist(), token_arrays(documents))
    np.testing.assert_array_equal(np.concatenate([block.x_ND for block in blocks]), expected_ND)
    np.testing.assert_array_equal(np.concatenate([block.weights_N for block in blocks]), weights(documents))
    assert (
        np.concatenate([block.ids_N for block in blocks]).tolist()
        == np.array(documents["id"].to_pylist(), "S16").tolist()
    )
    for count in (1, 20, len(documents)):
        np.testing.assert_array_equal(first_vectors(files, count), expected_ND[:count])
        costs = first_costs(files, count, None, None)
        np.testing.assert_array_equal(costs.cost_NE, expected_ND[:count])
        assert len(costs.ids_N) == len(costs.weights_N) == count


def test_k_means_is_fitted_on_a_sample_of_many_documents(tmp_path, monkeypatch):
    """Documents after the first 3 x 64 do not change the centroids."""
    monkeypatch.setattr("moedisco_ray.stages.clustering.build.CENTROID_DOCUMENTS", 64)
    monkeypatch.setattr("moedisco_ray.stages.clustering.build.SAMPLED_DOCUMENTS", 150)
    corpus, model = write_corpus(tmp_path / "corpus", documents=900, parts=3), write_model(tmp_path / "model")
    fits = []
    for name in ("all", "fewer"):
        (tmp_path / name).mkdir()
        build_clusters(run_config(), corpus, model, tmp_path / name, LocalWorkers())
        fits.append(np.load(tmp_path / name / "cluster_model" / "clusters.npz")["centroids"])
        (corpus / "train" / "part-00002.parquet").unlink(missing_ok=True)
    np.testing.assert_array_equal(*fits)


@pytest.mark.parametrize("seed", range(5))
def test_mutual_information_from_counts_is_that_of_labels(seed):
    generator = np.random.default_rng(seed)
    sources_N, clusters_N = generator.integers(0, 4, 500), generator.integers(0, 5, 500)
    clusters_N = np.where(generator.random(500) < 0.5, sources_N, clusters_N)
    counts_PE = np.zeros((4, 7), np.int64)  # two clusters are empty
    np.add.at(counts_PE, (sources_N, clusters_N), 1)
    assert mutual_information(counts_PE) == normalized_mutual_info_score(sources_N, clusters_N)
