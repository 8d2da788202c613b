from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.store.artifacts import read_json, write_json
from moedisco_ray.packed_tokens import (
    Piece,
    TokenStream,
    batch_indices,
    best_fit,
    write_conversations,
    write_index,
    write_packed,
)

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
            assert opened.document_starts(i).tolist() == [token == EOS for token in window[:-1]]
            assert opened.filled(i) == length + 1


def counted(talk):
    return any(counts for _, counts in talk[1:])


conversations = st.lists(
    st.lists(st.tuples(st.integers(2, 99), st.booleans()), min_size=1, max_size=20), min_size=1, max_size=9
)


@settings(max_examples=50, deadline=None)
@given(
    parts=st.lists(conversations, min_size=1, max_size=3),
    running=documents,
    length=st.integers(2, 15),
    bos=st.sampled_from([None, 1]),
)
def test_conversations_are_whole_in_one_window_each(parts, running, length, bos):
    begin = [] if bos is None else [(bos, False)]
    whole = [[*begin, *talk] for talks in parts for talk in talks]
    kept = [talk[: length + 1] for talk in whole]
    kept = [[(talk[0][0], False), *talk[1:]] for talk in kept if counted(talk)]
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        write_packed(directory, [arrays([running])], EOS, 100)
        pieces = [Piece("part-00000.npy", 1, len(running) + 1)]
        for number, talks in enumerate(parts):
            flat = [each for talk in talks for each in talk]
            ids, mask = np.array([token for token, _ in flat]), np.array([counts for _, counts in flat])
            lengths, path = np.array([len(talk) for talk in talks]), directory / f"talks-{number}.npy"
            pieces.append(write_conversations(path, ids, mask, lengths, length=length, vocab_size=100, bos=bos))
        index = write_index(directory, pieces, 100, length)
        assert {path.name for path in directory.iterdir()} == {
            "index.json",
            *(name for piece in pieces for name in piece.files),
        }
        assert index["tokens"] == len(running) + 1 + sum(map(len, kept))
        long = [talk for talk in whole if len(talk) > length + 1]
        assert sum(piece.cut for piece in pieces) == len(long)
        left_out = sum(piece.left_out for piece in pieces)
        used = [talk for talk in long if counted(talk[: length + 1])]
        assert left_out == sum(map(len, long)) - (length + 1) * len(used)
        if not kept and len(running) < length:
            return
        stream, found = TokenStream([directory], length), []
        first = len(running) // length
        for i in range(first, len(stream)):
            tokens, counts = stream.window(i), [False, *stream.loss_mask(i)]
            starts, filled = np.flatnonzero(stream.document_starts(i)).tolist(), stream.filled(i)
            for start, stop in itertools.pairwise([*(start for start in starts if start < filled), filled]):
                found.append(list(zip(tokens[start:stop].tolist(), counts[start:stop], strict=True)))
            assert filled in {*starts, length, length + 1}
            assert not any(tokens[filled:])
            assert not any(counts[filled:])
        assert sorted(found) == sorted(kept)


@given(st.lists(st.integers(1, 30), max_size=60))
def test_a_document_is_in_the_fullest_window_with_room_for_it(lengths):
    window = best_fit(np.array(lengths, dtype=np.int64), 30).tolist()
    used = {}
    for document in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        with_room = [space for space in used.values() if space + lengths[document] <= 30]
        assert used.get(window[document], 0) == max(with_room, default=0)
        used[window[document]] = used.get(window[document], 0) + lengths[document]
    assert sorted(used) == list(range(len(used)))
    assert all(space <= 30 for space in used.values())


def test_files_of_version_1_are_read_as_they_were_packed(tmp_path):
    np.save(tmp_path / "part-00000.npy", np.arange(1, 10, dtype=np.uint16))
    mask = np.array([True, False, False, True, True, False, True, True, False])
    with (tmp_path / "part-00000.mask").open("wb") as file:
        np.save(file, np.packbits(mask))
    old = {"tokens": 9, "documents": 1, "dtype": "uint16", "parts": ["part-00000.npy"], "masked": ["part-00000.npy"]}
    write_json(tmp_path / "index.json", old)
    stream = TokenStream([tmp_path], 4)
    assert [stream.window(i).tolist() for i in range(len(stream))] == [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9]]
    assert [stream.loss_mask(i).tolist() for i in range(2)] == [mask[1:5].tolist(), mask[5:].tolist()]
    assert stream.without_starts == tmp_path / "part-00000.npy"


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
