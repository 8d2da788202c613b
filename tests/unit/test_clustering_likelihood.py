"""Clusters by likelihood: the language models against a reference in plain Python, and the clusters that they find."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from clustering_corpus import run_config
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import normalized_mutual_info_score
from test_clustering_assign import ids_of

from moedisco_ray.stages.clustering.vectors import FitInputs, language, load_vectoriser
from moedisco_ray.stages.clustering.vectors.language import LanguageModels, Text
from moedisco_ray.stages.clustering.vectors.likelihood import Likelihood

VOCABULARY = 9
documents = st.lists(
    st.lists(st.integers(0, 12), max_size=12).map(lambda ids: np.array(ids, np.int32)), min_size=1, max_size=12)


def pairs_of(document, most):
    ids = [min(int(i), VOCABULARY - 1) for i in document[:most]]
    return list(zip([VOCABULARY - 1, *ids], ids, strict=False))


def reference(tokens, labels, clusters, most, *, leave_out):
    """Nats per token by dictionaries; with so few pairs none collide."""
    pairs = [pairs_of(document, most) for document in tokens]
    everything = Counter(b for document in pairs for _, b in document)
    costs = np.zeros((len(tokens), clusters))
    for i, document in enumerate(pairs):
        for k in range(clusters):
            members = [pairs[j] for j in range(len(tokens)) if labels[j] == k and not (leave_out and j == i)]
            pair = Counter(p for other in members for p in other)
            token, before = Counter(), Counter()
            for (a, b), count in pair.items():
                token[b] += count
                before[a] += count
            nats = 0.0
            for a, b in document:
                overall = (everything[b] + 1) / (everything.total() + VOCABULARY)
                plain = (token[b] + 200 * overall) / (token.total() + 200)
                nats -= math.log((pair[a, b] + 20 * plain) / (before[a] + 20))
            costs[i, k] = nats / max(len(document), 1)
    return costs


@settings(max_examples=60, deadline=None)
@given(documents, st.integers(1, 3), st.integers(1, 9), st.booleans(), st.data())
def test_costs_are_the_formulas(tokens, clusters, most, leave_out, data):
    labels = data.draw(st.lists(st.integers(0, clusters - 1), min_size=len(tokens), max_size=len(tokens)).map(np.array))
    text = Text.of(tokens, VOCABULARY, most)
    models = LanguageModels.count(text, labels, clusters, VOCABULARY)
    expected = reference(tokens, labels, clusters, most, leave_out=leave_out)
    np.testing.assert_allclose(models.costs(text, labels if leave_out else None), expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(documents, documents, st.data())
def test_counts_of_blocks_add_up(one, two, data):
    labels = data.draw(st.lists(st.integers(0, 2), min_size=len(one) + len(two), max_size=len(one) + len(two)).map(np.array))

    def count(tokens, clusters_N):
        return LanguageModels.count(Text.of(tokens, VOCABULARY, 8), clusters_N, 3, VOCABULARY)

    whole, first, second = count([*one, *two], labels), count(one, labels[:len(one)]), count(two, labels[len(one):])
    for field in ("token_EV", "before_EV", "pair_EH"):
        np.testing.assert_array_equal(getattr(whole, field), getattr(first, field) + getattr(second, field))


def test_no_two_pairs_of_the_reference_share_a_counter():
    everything = [np.array([a, b]) for a in range(VOCABULARY) for b in range(VOCABULARY)]
    counters = {(int(text.before_T[1]), int(text.token_T[1])): int(text.pair_T[1])
                for text in (Text.of([pair], VOCABULARY, 2) for pair in everything)}
    assert len(set(counters.values())) == VOCABULARY**2
    assert max(counters.values()) < 1 << language._HASH_BITS


def grammars(documents=120, kinds=3, length=40, seed=0):
    """Documents of the same tokens in the same shares: only the order of tokens distinguishes the kinds."""
    follows = [np.random.default_rng(kind).permutation(20) for kind in range(kinds)]
    generator = np.random.default_rng(100 + seed)
    texts = []
    for i in range(documents):
        ids = [int(generator.integers(20))]
        for _ in range(length - 1):
            ids.append(int(follows[i % kinds][ids[-1]]) if generator.random() < 0.7 else int(generator.integers(20)))
        texts.append(np.array(ids, np.int32))
    return texts, np.arange(documents) % kinds


def inputs(tokens, **clusters):
    chosen = run_config(**{"restarts": 2} | clusters)
    weights_N = np.array([len(document) + 1 for document in tokens])
    return FitInputs(
        texts=[""] * len(tokens), tokens=tokens, weights_S=weights_N, ids_S=ids_of(len(tokens)), model_dir=None, max_tokens=16,
        settings=chosen.clusters, seed=0)


def test_em_tells_grammars_apart_that_share_all_their_words():
    tokens, kinds = grammars()
    fitted = Likelihood.fit(inputs(tokens))
    assert normalized_mutual_info_score(kinds, fitted.embed([], tokens).argmin(1)) > 0.95
    new, kinds = grammars(60, seed=1)
    assert normalized_mutual_info_score(kinds, fitted.embed([], new).argmin(1)) > 0.95


def test_a_document_is_judged_by_the_others():
    tokens, _ = grammars()
    labels = np.random.default_rng(0).integers(0, 3, len(tokens))
    text = Text.of(tokens, 21, 256)
    models = LanguageModels.count(text, labels, 3, 21)
    stays = [(models.costs(text, counted).argmin(1) == labels).mean() for counted in (None, labels)]
    assert stays[0] > 0.5 > stays[1]


def test_a_loaded_model_says_the_same_alone_and_of_strange_tokens(tmp_path):
    tokens, _ = grammars(30)
    fitted = Likelihood.fit(inputs(tokens))
    fitted.save(tmp_path)
    strange = [*tokens, np.array([5000, 1, 70_000], np.int32), np.empty(0, np.int32)]
    costs_NE = fitted.embed([], strange)
    loaded = load_vectoriser(tmp_path)
    for i in (0, 7, 30, 31):
        np.testing.assert_array_equal(loaded.embed([], [strange[i]])[0], costs_NE[i])
    assert np.isfinite(costs_NE).all()
    assert not costs_NE[-1].any()


@pytest.mark.parametrize("count", [1, 4])
def test_the_same_seed_gives_the_same_clusters(count):
    tokens, _ = grammars(40)
    one, two = (Likelihood.fit(inputs(tokens, count=count)).embed([], tokens) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert one.shape == (40, count)
