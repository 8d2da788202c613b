from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moedisco_ray.stages.corpus import documents
from moedisco_ray.stages.corpus.documents import (
    bucket_of,
    copies,
    dedupe_and_sort,
    id_matrix,
    is_validation,
    staged_table,
)
from moedisco_ray.stages.text.cutting import Document, Kept

texts = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), max_size=30)


def staged(found, order):
    return staged_table([Document(text, begins=True) for text in found], order)


def ids_of(count):
    return id_matrix(staged([f"document {i}" for i in range(count)], 0))


def rows(table):
    return list(zip(table["id"].to_pylist(), table["order"].to_pylist(), table["text"].to_pylist(), strict=True))


@given(texts)
def test_ids_are_blake2b_of_the_text_through_slices_and_chunks(found):
    expected = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in found]
    table = staged(found, 3)
    assert table["id"].to_pylist() == expected
    half = len(found) // 2
    assert [bytes(row) for row in id_matrix(table)] == expected
    assert [bytes(row) for row in id_matrix(table.slice(half))] == expected[half:]
    chunked = pa.concat_tables([table.slice(half), table.slice(0, half)])
    assert [bytes(row) for row in id_matrix(chunked)] == expected[half:] + expected[:half]


@given(st.lists(texts, min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_duplicates_go_the_first_source_wins_and_order_of_reading_does_not_matter(sources, random):
    table = pa.concat_tables([staged(found, order) for order, found in enumerate(sources)])
    shuffled = table.take(pa.array(random.sample(range(len(table)), len(table)), pa.int64()))
    first = {}
    for order, found in enumerate(sources):
        for text in found:
            first.setdefault(hashlib.blake2b(text.encode(), digest_size=16).digest(), (order, text))
    expected = [(key, *first[key]) for key in sorted(first)]
    assert rows(dedupe_and_sort(table)) == expected
    assert rows(dedupe_and_sort(shuffled)) == expected


def test_of_equal_documents_what_was_held_out_once_stays_held_out():
    new = staged(["a", "b", "c"], 0)
    kept = {
        "a": Kept(bytes(16), held_out=True),
        "b": Kept(bytes(16), held_out=False),
        "d": Kept(bytes(16), held_out=True),
    }
    table = pa.concat_tables(
        [new, staged_table([Document(text, begins=True, kept=each) for text, each in kept.items()], 1)]
    )
    for each in (table, table.take(pa.array([5, 3, 1, 0, 4, 2]))):
        found = dedupe_and_sort(each)
        assert {row["text"]: (row["order"], row["side"]) for row in found.to_pylist()} == {
            "a": (0, documents.HELD_OUT),
            "b": (0, documents.TRAINED),
            "c": (0, documents.NEW),
            "d": (1, documents.HELD_OUT),
        }
    assert len(dedupe_and_sort(table.slice(0, 0))) == 0


@given(st.lists(st.binary(min_size=16, max_size=16), min_size=1, max_size=50), st.integers(1, 1000))
def test_buckets_split_the_ascending_ids(found, buckets):
    found = sorted(found)
    matrix = np.frombuffer(b"".join(found), dtype=np.uint8).reshape(-1, 16)
    expected = [int.from_bytes(key[:4], "big") * buckets >> 32 for key in found]
    assert bucket_of(matrix, buckets).tolist() == expected
    assert expected == sorted(expected)
    assert max(expected) < buckets


@pytest.mark.parametrize("weight", [0.25, 1.0, 1.5, 3.0])
def test_copies_have_the_weight_as_their_mean(weight):
    drawn = copies(ids_of(20_000), weight)
    assert set(drawn.tolist()) <= {int(np.floor(weight)), int(np.ceil(weight))}
    assert drawn.mean() == pytest.approx(weight, abs=0.015)  # four standard deviations of a mean of 20,000


def test_more_weight_never_means_fewer_copies():
    ids = ids_of(500)
    drawn = np.array([copies(ids, weight) for weight in np.linspace(0.1, 3, 30)])
    assert (np.diff(drawn, axis=0) >= 0).all()


def held_out_of(ids, fraction, seed=0, *extremes):
    return is_validation(documents.validation_hash(ids, seed), fraction, *extremes)


def test_validation_is_a_share_by_document_and_seed():
    ids = ids_of(20_000)
    held_out = held_out_of(ids, 0.1, 5)
    assert held_out.mean() == pytest.approx(0.1, abs=0.009)
    order = np.random.Generator(np.random.Philox(key=[1, 2])).permutation(len(ids))
    assert np.array_equal(held_out_of(ids[order], 0.1, 5), held_out[order])
    assert held_out_of(ids, 0.2, 5)[held_out].all()
    other = held_out_of(ids, 0.1, 6)
    assert (held_out & other).mean() == pytest.approx(0.01, abs=0.003)


def test_split_copies_and_bucket_are_independent():
    ids = ids_of(20_000)
    held_out = held_out_of(ids, 0.3)
    assert copies(ids, 0.5)[held_out].mean() == pytest.approx(0.5, abs=0.03)
    assert (bucket_of(ids, 2)[held_out]).mean() == pytest.approx(0.5, abs=0.03)


def test_every_source_of_two_documents_has_one_on_each_side():
    ids = ids_of(5)
    hashes = documents.validation_hash(ids, 1)
    assert held_out_of(ids, 1e-9, 1).sum() == 0
    assert held_out_of(ids, 1e-9, 1, hashes.min(), hashes.max()).sum() == 1
    assert held_out_of(ids, 0.999, 1, hashes.min(), hashes.max()).sum() == 4
    assert held_out_of(ids[:1], 0.999, 1, hashes[0], hashes[0]).sum() == 0
