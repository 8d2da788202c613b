from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.packed_tokens import LossMask, TokenStream, batch_indices, write_index, write_packed, write_piece

EOS = 0
documents = st.lists(st.integers(1, 99), max_size=20)
parts_of_documents = st.lists(st.lists(documents, max_size=5), max_size=4)


def pack(directory, parts, vocab_size=100):
    return write_packed(directory, [arrays(part) for part in parts], EOS, vocab_size)


def arrays(documents):
    return [np.array(document, dtype=np.int32) for document in documents]


def joined(parts):
    return [token for part in parts for document in part for token in [*document, EOS]]


@settings(max_examples=50, deadline=None)
@given(directories=st.lists(parts_of_documents, min_size=1, max_size=2), length=st.integers(1, 9))
def test_windows_lose_nothing_and_share_only_their_border_token(directories, length):
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch) / str(i) for i in range(len(directories))]
        for path, parts in zip(paths, directories, strict=True):
            index = pack(path, parts)
            assert index == read_json(path / "index.json")
            assert index["documents"] == sum(len(part) for part in parts)
            assert index["tokens"] == len(joined(parts))
        stream = [token for parts in directories for token in joined(parts)]
        windows = (len(stream) - 1) // length if stream else 0
        if windows < 1:
            with pytest.raises(CorpusError, match=r"corpus\.sequence_length"):
                TokenStream(paths, length)
            return
        opened = TokenStream(paths, length)
        assert len(opened) == windows
        for i in range(windows):
            window = opened.window(i)
            assert window.dtype == np.int64
            assert window.tolist() == stream[i * length : (i + 1) * length + 1]


masked_documents = st.lists(st.tuples(st.lists(st.booleans(), max_size=20), st.booleans()), max_size=5)


@settings(max_examples=50, deadline=None)
@given(
    parts=st.lists(st.none() | masked_documents, min_size=1, max_size=4),
    length=st.integers(1, 9),
    bos=st.sampled_from([None, 1]),
)
def test_the_loss_mask_follows_the_tokens(parts, length, bos):
    expected, pieces = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for number, part in enumerate(parts):
            found = [([True] * 3, True)] if part is None else part
            for mask, special in found:
                expected += [*([] if bos is None else [special]), *mask, special]
            flat = [each for mask, _ in found for each in mask]
            mask = LossMask(np.array(flat, bool), np.array([each for _, each in found], bool))
            ids, lengths = np.full(len(mask.ids), 7), np.array([len(mask) for mask, _ in found], dtype=np.int64)
            if len(lengths):
                pieces.append(
                    write_piece(
                        Path(scratch) / f"part-{number:05d}.npy",
                        ids,
                        lengths,
                        eos=EOS,
                        bos=bos,
                        vocab_size=9,
                        mask=None if part is None else mask,
                    )
                )
        index = write_index(Path(scratch), pieces, 9)
        assert index.get("masked", []) == [piece.name for piece in pieces if piece.masked]
        written = {path.name for path in Path(scratch).iterdir()}
        assert written == {"index.json", *(name for piece in pieces for name in piece.files)}
        if len(expected) <= length:
            return
        stream = TokenStream([Path(scratch)], length)
        assert stream.masked == any(piece.masked for piece in pieces)
        for i in range(len(stream)):
            assert stream.loss_mask(i).tolist() == expected[i * length + 1 : (i + 1) * length + 1]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_the_type_on_disk_is_the_narrowest_that_holds_the_vocabulary(tmp_path, vocab_size, dtype):
    index = pack(tmp_path, [[[1, vocab_size - 1]]], vocab_size)
    assert index["dtype"] == dtype
    assert np.load(tmp_path / index["parts"][0]).tolist() == [1, vocab_size - 1, EOS]


def test_an_id_outside_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(CorpusError, match="outside the vocabulary of 100"):
        pack(tmp_path, [[[100]]])


def test_a_directory_without_tokens_is_named(tmp_path):
    with pytest.raises(CorpusError, match="holds no packed tokens"):
        TokenStream([tmp_path], 4)


def test_a_window_that_is_not_there(tmp_path):
    pack(tmp_path, [[[1, 2, 3, 4]]])
    stream = TokenStream([tmp_path], 2)
    for i in (-1, 2):
        with pytest.raises(IndexError):
            stream.window(i)


@given(seed=st.integers(0, 2**31 - 1), batch=st.integers(1, 12), windows=st.integers(1, 30), epochs=st.integers(1, 3))
def test_each_epoch_visits_each_window_once(seed, batch, windows, epochs):
    steps = -(-epochs * windows // batch)
    order = np.concatenate([batch_indices(seed, step, batch, windows) for step in range(steps)])
    for epoch in range(epochs):
        visited = order[epoch * windows : (epoch + 1) * windows]
        assert sorted(visited) == list(range(windows))


def test_the_order_depends_on_seed_and_epoch_and_not_on_the_batch():
    order = np.concatenate([batch_indices(7, step, 5, 100) for step in range(40)])
    assert np.array_equal(order, np.concatenate([batch_indices(7, step, 8, 100) for step in range(25)]))
    assert not np.array_equal(order[:100], order[100:])
    assert not np.array_equal(order[:100], np.concatenate([batch_indices(8, step, 5, 100) for step in range(20)]))


@pytest.mark.parametrize(
    ("bos", "expected"),
    [
        (None, [5, 6, EOS, EOS, 7, EOS]),
        (1, [1, 5, 6, EOS, 1, EOS, 1, 7, EOS]),
        (EOS, [EOS, 5, 6, EOS, EOS, EOS, EOS, 7, EOS]),
    ],
)
def test_special_tokens_surround_each_document(tmp_path, bos, expected):
    index = write_packed(tmp_path, [[np.array(ids, np.int32) for ids in ([5, 6], [], [7])]], EOS, 10, bos)
    assert np.load(tmp_path / index["parts"][0]).tolist() == expected
    assert (index["documents"], index["tokens"]) == (3, len(expected))
