"""The whole cluster stage in one process, and its report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clustering_corpus import WORDS, run_config, write_corpus, write_model
from pretrained_start import write_tokenizer
from scipy.stats import kstest
from sklearn.metrics import normalized_mutual_info_score

from moedisco_ray.backend import vectors_kind
from moedisco_ray.core.config import Pools, Tokens, check_config
from moedisco_ray.core.errors import CorpusError
from moedisco_ray.packed_tokens import INDEX
from moedisco_ray.stages.clustering import ClusterModel
from moedisco_ray.stages.clustering.build import LocalWorkers, build_clusters, documents_needed, first_documents
from moedisco_ray.stages.clustering.distances import squared_distances
from moedisco_ray.stages.clustering.kmeans import fit_kmeans
from moedisco_ray.stages.clustering.report import Sample, cluster_report, silhouette
from moedisco_ray.stages.clustering.store import weights
from moedisco_ray.stages.clustering.vectors.random import RandomCosts
from moedisco_ray.stages.clustering.vectors.tfidf import TfidfSvd
from moedisco_ray.stages.corpus import build as build_corpus
from moedisco_ray.stages.text.tokenizer import Encoder

SMALL8 = Path(__file__).parents[3] / "shared" / "corpora" / "small8" / "train"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _a_sample_of_fewer_documents_than_the_corpus(monkeypatch):
    monkeypatch.setattr("moedisco_ray.stages.clustering.build.SAMPLED_DOCUMENTS", 100)


def build(corpus, model_dir, directory, **clusters):
    return build_clusters(run_config(**clusters), corpus, model_dir, directory, LocalWorkers())


def read(directory):
    return pa.concat_tables([pq.read_table(path) for path in sorted(directory.glob("*.parquet"))])


def build_for(tokens, corpus, model_dir, directory, **clusters):
    """Build clusters for sub-models that train on this number of tokens."""
    config = run_config(**clusters)
    config = config.model_copy(update={"tokens": Tokens(total=2 * tokens, seed_share=0.0, finetune_share=0.5)})
    return build_clusters(config, corpus, model_dir, directory, LocalWorkers())


def assigned_anew(corpus, directory):
    documents = read(corpus / "train")
    tokens = [np.array(ids) for ids in documents["tokens"].to_pylist()]
    return ClusterModel.load(directory / "cluster_model").assign(documents["text"].to_pylist(), tokens)


@pytest.mark.parametrize("tokens", [1, 60, 1000, 2500])
def test_no_more_text_is_clustered_than_the_sub_models_need(tokens, corpus, model_dir, tmp_path):
    summary = build_for(tokens, corpus, model_dir, tmp_path)
    documents, assigned = read(corpus / "train"), read(tmp_path / "assignments")
    count = len(assigned)
    assert 3 <= count < len(documents)
    assert assigned["id"].to_pylist() == documents["id"].to_pylist()[:count]  # a hash's order: a random sample
    sizes_N = [
        (len(ids) + 1) * copies
        for ids, copies in zip(
            documents["tokens"].to_pylist()[:count], documents["copies"].to_pylist()[:count], strict=True
        )
    ]
    assert sum(entry["tokens"] for entry in summary["clusters"]) == sum(sizes_N) >= int(1.25 * tokens)
    assert count == 3 or sum(sizes_N[:-1]) < int(1.25 * tokens)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["assignments", "cluster_model", "report.json", "shards"]


def test_a_documents_weight_is_what_is_packed_of_it_bos_included(tmp_path):
    """Capacities, shares and how much text is needed count in the tokens that sub-models train on."""
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "x.txt").write_text("\n".join(f"line {i} of the text, {i * i}" for i in range(200)))
    source = {"path": str(tmp_path / "x.txt"), "documents": "line", "weight": 1.5}
    config = check_config(
        {
            "name": "t",
            "corpus": {"sources": [source], "sequence_length": 32},
            "tokenizer": {"path": str(tmp_path / "tokenizer")},
        }
    )
    (tmp_path / "corpus").mkdir()
    summary = build_corpus(config, tmp_path / "corpus")
    documents = read(tmp_path / "corpus" / "train")
    assert Encoder(tmp_path / "corpus" / "tokenizer").bos is not None
    index = json.loads((tmp_path / "corpus" / "shards" / INDEX).read_text())
    assert weights(documents).sum() == summary["tokens"] == index["tokens"]
    wanted = summary["tokens"] // 2
    tokens = Tokens(total=int(wanted / 1.25), seed_share=0.0, finetune_share=0.0)
    count = documents_needed(
        config.model_copy(update={"tokens": tokens}), sorted((tmp_path / "corpus" / "train").glob("*"))
    )
    packed = [
        (len(ids) + 2) * copies
        for ids, copies in zip(documents["tokens"].to_pylist(), documents["copies"].to_pylist(), strict=True)
    ]
    assert sum(packed[: count - 1]) < int(1.25 * tokens.submodels) <= sum(packed[:count])


def test_a_corpus_that_is_not_larger_is_clustered_whole(corpus, model_dir, tmp_path):
    summary = build_for(10**6, corpus, model_dir, tmp_path)
    assert sum(entry["documents"] for entry in summary["clusters"]) == len(read(corpus / "train"))


@pytest.mark.parametrize("vectors", ["mean_token", "tfidf_svd", "hidden_state"])
def test_every_document_is_in_one_cluster_and_every_token_in_its_shard(vectors, corpus, model_dir, tmp_path):
    summary = build(corpus, model_dir, tmp_path, vectors=vectors)
    documents, assigned = read(corpus / "train"), read(tmp_path / "assignments")
    assert assigned["id"].to_pylist() == documents["id"].to_pylist()
    clusters_N = assigned["cluster"].to_numpy()
    assert sum(entry["documents"] for entry in summary["clusters"]) == len(documents)
    assert summary["balance"] <= 1.05
    for k in range(3):
        packed = np.concatenate([np.load(path) for path in sorted((tmp_path / "shards" / str(k)).glob("*.npy"))])
        rows = np.flatnonzero(clusters_N == k)
        expected = [[*documents["tokens"][int(i)].as_py(), 0] for i in rows]
        assert len(packed) == summary["clusters"][k]["tokens"]
        np.testing.assert_array_equal(packed[: sum(map(len, expected))], np.concatenate(expected))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["assignments", "cluster_model", "report.json", "shards"]


def test_domains_are_found_and_the_report_shows_them(corpus, model_dir, tmp_path):
    summary = build(corpus, model_dir, tmp_path, capacity=None)
    report = json.loads((tmp_path / "report.json").read_text())
    assert summary["nmi"] == report["nmi"] > 0.95
    assert summary["silhouette"] > 0.2
    assert summary["iterations"] >= 1
    named = {frozenset(entry["terms"][:5]) for entry in report["clusters"]}
    for words in WORDS.values():
        assert any(terms <= set(words) for terms in named)
    assert all(len(entry["examples"]) == 3 for entry in report["clusters"])
    assert {len(report["map"][key]) for key in ("x", "y", "cluster", "source")} == {100}
    np.testing.assert_array_equal(assigned_anew(corpus, tmp_path), read(tmp_path / "assignments")["cluster"].to_numpy())


def test_random_clusters_are_balanced_and_know_nothing_of_domains(corpus, model_dir, tmp_path):
    summary = build(corpus, model_dir, tmp_path / "balanced", vectors="random")
    assert summary["balance"] <= 1.05
    assert summary["nmi"] < 0.05
    assert summary["inertia"] is None
    report = json.loads((tmp_path / "balanced" / "report.json").read_text())
    assert report["vectors"] == "random"
    assert all(len(entry["examples"]) == 3 for entry in report["clusters"])
    build(corpus, model_dir, tmp_path / "free", vectors="random", capacity=None)
    free_N = read(tmp_path / "free" / "assignments")["cluster"].to_numpy()
    assert np.bincount(free_N).min() > 50  # of 240 in 3
    np.testing.assert_array_equal(assigned_anew(corpus, tmp_path / "free"), free_N)
    balanced_N = read(tmp_path / "balanced" / "assignments")["cluster"].to_numpy()
    assert (balanced_N == free_N).mean() > 0.9  # balancing moves few


def test_random_costs_are_uniform_and_independent_whatever_the_company():
    texts = [f"text {i}" for i in range(4000)]
    costs_NE = RandomCosts(3, 0).embed(texts, [])
    for column in costs_NE.T:
        assert kstest(column, "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(costs_NE.T) - np.eye(3)).max() < 0.05
    np.testing.assert_array_equal(RandomCosts(3, 0).embed(texts[7:8], []), costs_NE[7:8])
    assert (RandomCosts(3, 1).embed(texts, []).argmin(1) == costs_NE.argmin(1)).mean() < 0.4


def test_fewer_documents_than_clusters_is_told(model_dir, tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=5, parts=2)
    with pytest.raises(CorpusError, match=r"clusters.count: 6: the corpus has 5"):
        build(corpus, model_dir, tmp_path, count=6)


@pytest.mark.parametrize(("parts", "vectors"), [(1, "tfidf_svd"), (4, "tfidf_svd"), (4, "random")])
def test_the_number_of_parts_changes_nothing(parts, vectors, model_dir, corpus, tmp_path):
    other = write_corpus(tmp_path / "corpus", parts=parts)
    one, two = (build(path, model_dir, tmp_path / str(i), vectors=vectors) for i, path in enumerate((corpus, other)))
    assert one == two
    assert read(tmp_path / "0" / "assignments").equals(read(tmp_path / "1" / "assignments"))


def test_the_sample_is_the_smallest_ids(corpus):
    ids = sorted(read(corpus / "train")["id"].to_pylist())
    assert first_documents(sorted((corpus / "train").glob("*")), 90)["id"].to_pylist() == ids[:90]


def test_a_report_of_one_cluster_and_one_source():
    sample = Sample(["a word", "another word"], ["x", "x"], np.eye(2, dtype=np.float32), np.zeros(2, np.int64))
    report = cluster_report(sample, np.zeros((1, 2)), tokens_E=np.array([7]), documents_PE=np.array([[2]]))
    assert report["nmi"] is None
    assert report["silhouette"] is None
    assert report["balance"] == 1
    assert report["clusters"][0]["tokens"] == 7
    assert silhouette(np.ones((1, 2), np.float32), np.zeros(1, np.int64)) is None


@pytest.mark.skipif(not SMALL8.is_dir(), reason="the shared corpora are not here")
def test_domains_of_real_text_are_found():
    texts, sources = [], []
    for name in sorted(SMALL8.glob("*.txt")):
        text = name.read_text(encoding="utf-8")
        chunks = [text[at : at + 1000] for at in range(0, len(text) - 999, 2000)]
        texts += chunks
        sources += [name.stem] * len(chunks)
    x_ND = TfidfSvd.of_texts(texts, 32, 0).transform(texts, [])
    fit = fit_kmeans(x_ND, 8)
    assert normalized_mutual_info_score(sources, squared_distances(x_ND, fit.centroids_KD).argmin(axis=1)) > 0.8


def mixed(**memory_gb):
    """A default run whose low-memory pool has a node type of each name, the first the cheapest."""
    types = [
        {"name": name, "resource": f"{name}_gpu", "memory_gb": memory, "price_per_hour": 1.0 + i, "speed": 1.0}
        for i, (name, memory) in enumerate(memory_gb.items())
    ]
    config = run_config(vectors="hidden_state")
    return config.model_copy(update={"pools": Pools.model_validate({"low_memory": {"types": types}})})


@pytest.mark.parametrize(
    ("memory_gb", "slots", "chosen"),
    [
        ({"small": 1, "cheap": 24, "dear": 80}, {}, "cheap"),  # the model and its overhead need a little more than 1 GB
        ({"cheap": 24, "dear": 80}, {"cheap": 0, "dear": 2}, "dear"),
        ({"cheap": 24, "dear": 80}, {"cheap": 0, "dear": 0}, "cheap"),  # an autoscaler is to bring one
        ({"small": 0.5, "larger": 0.6}, {}, "larger"),
    ],
)
def test_vectors_are_made_where_the_model_fits_for_the_least_money(tmp_path, memory_gb, slots, chosen):
    there = {f"low_memory.{name}": count for name, count in slots.items()}
    kind = vectors_kind(mixed(**memory_gb), write_model(tmp_path), there)
    assert kind.key == f"low_memory.{chosen}"


def test_vectors_of_text_alone_take_no_slots(tmp_path):
    assert vectors_kind(run_config(), tmp_path, {}) is None
