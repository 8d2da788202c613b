"""Where text is cut into documents, and that nothing of it is lost."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moedisco_ray.stages.text.cutting import Cutter, Document, Limits, cut_document

texts = st.text(st.sampled_from("ab é語。.!? \n\t\r"), max_size=400)


def cut(data: bytes, about: int, *feeds: int) -> list[bytes]:
    cutter, pieces, at = Cutter(about), [], 0
    for size in (*feeds, len(data)):
        pieces += cutter.feed(data[at : at + size])
        at += size
    return [*pieces, *cutter.finish()]


@settings(max_examples=300, deadline=None)
@given(text=texts, about=st.integers(8, 60), feeds=st.lists(st.integers(0, 50), max_size=12))
def test_pieces_are_the_text_however_it_is_fed_and_bounded(text: str, about: int, feeds: list[int]) -> None:
    data = text.encode()
    pieces = cut(data, about)
    assert b"".join(pieces) == data
    assert "".join(piece.decode() for piece in pieces) == text  # no character is cut through
    assert cut(data, about, *feeds) == pieces
    assert all(len(piece) <= about * 3 // 2 for piece in pieces)
    if len(pieces) > 1:
        assert all(len(piece) >= about // 2 - 3 for piece in pieces)


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("word " * 8 + "\n\n" + "line\n" * 20, "\n\n"),
        ("some words " * 4 + "\n" + "a sentence. " * 10, "\n"),
        ("one. " + "two words " * 5 + "end. " + "more words " * 9, ". "),
        ("一二三四五六七八九十。" + "八九十百千万" * 9, "。"),
        ("word " * 30, " "),
        ("x" * 120, "x"),
    ],
)
def test_the_best_place_is_taken(text: str, ends: str) -> None:
    first, *rest = cut(text.encode(), 48)
    assert rest
    assert first.decode().endswith(ends)


def test_a_long_document_becomes_one_group_and_a_short_one_stays_as_it_is() -> None:
    limits = Limits(sequence_tokens=16, document_tokens=32)
    assert list(cut_document("\n short \n", limits.part)) == [Document("\n short \n", begins=True)]
    parts = list(cut_document("A sentence of words.\n\n" * 60, limits.part))
    assert len(parts) > 5
    assert [part.begins for part in parts] == [True] + [False] * (len(parts) - 1)
    assert re.sub(r"\n+", "", "".join(part.text for part in parts)) == "A sentence of words." * 60
