"""Near duplicates that MinHash finds, against exact Jaccard similarities of all pairs."""

from __future__ import annotations

import functools
import json
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from corpus_sources import scattered
from hypothesis import given, settings
from hypothesis import strategies as st

from moedisco_ray.core.config import check_config
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.stages.corpus import build
from moedisco_ray.stages.corpus.near_duplicates import Banding, shingles, sketches

WORDS = [f"word{i}" for i in range(800)]


def changed(words, count, generator):
    """The words with some of them replaced."""
    words = list(words)
    for i in generator.choice(len(words), count, replace=False):
        words[i] = f"new{generator.integers(10**9)}"
    return words


def some_texts(generator, originals=40):
    """Originals of 200 words, and copies with 1, 40 or 60 words replaced: similarities of 0.9, 0.2 and less."""
    texts = []
    for _ in range(originals):
        words = generator.choice(WORDS, 200)
        texts.append(" ".join(words))
        texts += [" ".join(changed(words, int(count), generator)) for count in generator.choice([1, 40, 60], 3)]
    return texts


@functools.lru_cache(1000)
def shingle_set(text):
    return frozenset(shingles(text))


def jaccard(one, other):
    a, b = shingle_set(one), shingle_set(other)
    common = len(a & b)
    return common / (len(a) + len(b) - common)


def config_of(path, **corpus):
    corpus = {"sources": path if isinstance(path, list) else [{"path": str(path)}], "sequence_length": 64, **corpus}
    return check_config({"name": "t", "corpus": corpus, "tokenizer": {"train_vocab_size": 320}})


def write(path, texts):
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def kept(directory):
    return {
        text
        for side in ("train", "validation")
        for path in (directory / side).iterdir()
        for text in pq.read_table(path)["text"].to_pylist()
    }


def make(directory, config, **options):
    directory.mkdir()
    return build(config, directory, **options)


def similarity_with_closest(text, texts):
    return max(jaccard(text, other) for other in texts if other != text)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_what_is_dropped_has_an_exact_similarity_above_the_threshold(seed, tmp_path):
    texts = some_texts(np.random.default_rng(seed))
    config = config_of(write(tmp_path / "x.jsonl", texts), max_document_tokens=100_000, near_duplicates=0.8)
    summary = make(tmp_path / "c", config)
    left = kept(tmp_path / "c")
    assert left <= set(texts)
    assert summary["near_duplicates"] == len(texts) - len(left)
    assert summary["documents"] + summary["validation_documents"] == len(left)
    closest = {text: similarity_with_closest(text, texts) for text in texts}
    # The threshold is far from all similarities, in standard errors of the estimate (0.035).
    assert all(similarity > 0.88 or similarity < 0.5 for similarity in closest.values())
    for text in set(texts) - left:
        assert closest[text] > 0.8
    for text in left:
        assert all(jaccard(text, other) < 0.8 for other in left if other != text)


def test_of_similar_documents_that_of_the_first_source_stays(tmp_path):
    generator = np.random.default_rng(5)
    first = [" ".join(generator.choice(WORDS, 200)) for _ in range(60)]
    second = [" ".join(changed(text.split(), 2, generator)) for text in first]
    paths = [write(tmp_path / f"{name}.jsonl", texts) for name, texts in (("a", first), ("b", second))]
    own = [" ".join(generator.choice(WORDS, 200)) for _ in range(20)]
    write(paths[1], [*second, *own])
    sources = [{"path": str(path), "name": path.stem} for path in paths]
    summary = make(tmp_path / "c", config_of(sources, max_document_tokens=100_000, near_duplicates=0.7))
    assert kept(tmp_path / "c") == {*first, *own}
    assert summary["near_duplicates"] == 60
    assert summary["sources"]["b"]["documents"] + summary["sources"]["b"]["validation_documents"] == 20


def test_the_result_does_not_depend_on_the_division_of_the_work(tmp_path, monkeypatch):
    config = config_of(write(tmp_path / "x.jsonl", some_texts(np.random.default_rng(9), 100)), near_duplicates=0.8)
    summaries = [make(tmp_path / "a", config)]
    monkeypatch.setattr("moedisco_ray.stages.corpus.near_duplicates._KEYS_BYTES", 200_000)
    monkeypatch.setattr("moedisco_ray.stages.corpus.near_duplicates._CHUNK", 7)
    monkeypatch.setattr(sys.modules[build.__module__], "range_count", lambda _: 5)
    summaries.append(make(tmp_path / "b", config, engine=scattered, unit_bytes=5000))
    assert kept(tmp_path / "a") == kept(tmp_path / "b")
    assert summaries[0] == summaries[1]


def test_what_an_earlier_run_held_out_stays(tmp_path):
    generator = np.random.default_rng(3)
    texts = [" ".join(generator.choice(WORDS, 200)) for _ in range(200)]
    make(
        tmp_path / "first",
        config_of(write(tmp_path / "x.jsonl", texts), validation_fraction=0.1, max_document_tokens=100_000),
    )
    held_out = {
        text
        for path in (tmp_path / "first" / "validation").iterdir()
        for text in pq.read_table(path)["text"].to_pylist()
    }
    similar = [" ".join(changed(text.split(), 1, generator)) for text in texts]
    sources = [{"path": str(write(tmp_path / "y.jsonl", similar)), "name": "similar"}]
    sources += [
        {"path": str(tmp_path / "first" / side / "*.parquet"), "name": side} for side in ("train", "validation")
    ]
    make(tmp_path / "second", config_of(sources, max_document_tokens=100_000, near_duplicates=0.8))
    assert held_out <= kept(tmp_path / "second")
    assert len(kept(tmp_path / "second")) == 200


def test_only_equal_texts_are_dropped_by_default(tmp_path):
    texts = some_texts(np.random.default_rng(1), 20)
    summary = make(
        tmp_path / "c", config_of(write(tmp_path / "x.jsonl", [*texts, texts[0]]), max_document_tokens=100_000)
    )
    assert (summary["duplicates"], summary["near_duplicates"]) == (1, 0)
    assert kept(tmp_path / "c") == set(texts)


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.7, 0.8, 0.9, 0.99, 1.0])
def test_bands_miss_few_similar_and_compare_few_dissimilar_documents(similarity):
    banding = Banding.of(similarity)

    def compared(exact):
        return 1 - (1 - exact**banding.rows) ** banding.bands

    assert banding.rows * banding.bands <= 128
    assert compared(similarity) >= 0.99
    assert compared(similarity / 3) < 0.6


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 60))
def test_a_sketch_estimates_the_similarity(seed, count):
    generator = np.random.default_rng(seed)
    words = generator.choice(WORDS, 200)
    one, other = " ".join(words), " ".join(changed(words, count, generator))
    a, b = sketches([one, other])
    assert abs((a == b).mean() - jaccard(one, other)) < 5 * 0.045


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A b, c-D e f!", ["a b c d e", "b c d e f"]),
        ("two words", ["two words"]),
        ("!?", ["!?"]),
        (
            "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0",
            ["\u65e5 \u672c \u8a9e \u306e \u6587", "\u672c \u8a9e \u306e \u6587 \u7ae0"],
        ),
    ],
)
def test_shingles_are_five_words_and_a_character_of_japanese_is_one(text, found):
    assert shingles(text) == found


@pytest.mark.parametrize("value", [0.0, 0.2, 1.1])
def test_a_similarity_out_of_range_is_refused(value, tmp_path):
    with pytest.raises(ConfigError, match=r"corpus\.near_duplicates"):
        config_of(tmp_path, near_duplicates=value)
