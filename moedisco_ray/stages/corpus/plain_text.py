"""Cut plain text into documents: one per file, paragraph or line, or by length. Memory does not grow with the file."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from moedisco_ray.stages.corpus.files import File
from moedisco_ray.stages.corpus.streams import decode, read_chunks, read_lines
from moedisco_ray.stages.text.cutting import Cutter, Document, Limits


def running_text(file: File, limits: Limits) -> Iterator[Document]:
    """Yield documents about as long as a training sequence, cut at blank lines if possible; neighbours form groups."""
    return _all_of(file, _Parts(limits.running, limits.neighbours))


def whole_files(file: File, limits: Limits) -> Iterator[Document]:
    """Yield the file as one document, or a long file as several documents in one group."""
    return _all_of(file, _Parts(limits.part))


def paragraphs(file: File, limits: Limits) -> Iterator[Document]:
    """Yield each paragraph between blank lines as a document, a long paragraph as several.

    Consecutive documents share a group up to `limits.group_bytes`; a group is held out for validation, or trained on,
    as a whole.
    """
    return _with_neighbours(_paragraphs(file, limits), limits.group_bytes)


def lines(file: File, limits: Limits, start: int, stop: int | None) -> Iterator[Document]:
    """Yield each line that begins in bytes [start, stop) of the file as a document, or as several if it is long."""
    parts = _Parts(limits.part)
    for at, data, ends in read_lines(file, start, stop):
        yield from parts.feed(at, data)
        if ends:
            yield from parts.finish()
    yield from parts.finish()


def _paragraphs(file: File, limits: Limits) -> Iterator[Document]:
    parts = _Parts(limits.part)
    begins = True
    for at, data, ends in read_lines(file):
        if begins and ends and not data.strip():
            yield from parts.finish()
        else:
            yield from parts.feed(at, data)
        begins = ends
    yield from parts.finish()


def _with_neighbours(documents: Iterable[Document], most: int) -> Iterator[Document]:
    """Join consecutive groups of documents until a joined group has at least `most` bytes."""
    held = most
    for document in documents:
        begins = document.begins and held >= most
        held = (0 if begins else held) + len(document.text.encode())
        yield document._replace(begins=begins)


class _Parts:
    """Cuts a stream of bytes into documents, without outer line breaks and without documents of only white space.

    Args:
        about: Target bytes of a document.
        neighbours: Number of consecutive documents that form a group; by default all documents of the stream are one
            group.
    """

    def __init__(self, about: int, neighbours: int = sys.maxsize) -> None:
        self._cutter = Cutter(about)
        self._neighbours = neighbours
        self._left = 0  # number of documents that the current group still lacks
        self._at = 0
        self._begun = False

    def feed(self, at: int, data: bytes) -> Iterator[Document]:
        if not self._begun:
            self._at, self._begun = at, True
        for piece in self._cutter.feed(data):
            yield from self._document(piece)

    def finish(self) -> Iterator[Document]:
        for piece in self._cutter.finish():
            yield from self._document(piece)
        self._left, self._begun = 0, False

    def _document(self, piece: bytes) -> Iterator[Document]:
        text = decode(piece, self._at)
        self._at += len(piece)
        if not text.isspace():
            yield Document(text.strip("\n"), begins=self._left == 0)
            self._left = (self._left or self._neighbours) - 1


def _all_of(file: File, parts: _Parts) -> Iterator[Document]:
    for at, data in read_chunks(file):
        yield from parts.feed(at, data)
    yield from parts.finish()
