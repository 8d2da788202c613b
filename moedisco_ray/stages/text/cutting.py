"""Cut text into documents of bounded length, at natural boundaries and in bounded memory.

Lengths are bytes of UTF-8. The tokenizer may not exist yet, since it may be trained on this text. So the number of
tokens is estimated from a constant number of bytes per token, and where text is cut depends only on the text and the
configuration.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_USUAL_BYTES = 3
"""Bytes per token assumed when documents are cut to about one sequence. Byte-level BPE of 2,000 to 16,000 entries has 2
to 4.3 (measured on prose, code and Japanese)."""
_MOST_BYTES = 6
"""Bytes per token that hardly any tokenizer exceeds. Only a document with more bytes than this times its maximum tokens
is cut by bytes; all others are cut later, when their tokens are known."""

_LEAST_GROUPS = 40
"""Minimum number of groups in a source of running text, so that a small source has groups in both training and
validation text."""

_PLACES = (
    re.compile(rb"\n(?:[ \t\r]*\n)+"),  # blank lines
    re.compile(rb"\n"),  # line ends
    re.compile(rb"[.!?][\"')\]]*[ \t]|\xe3\x80\x82|\xef\xbc\x81|\xef\xbc\x9f"),  # sentence ends, CJK included
    re.compile(rb"[ \t]"),  # between words
)
"""Patterns after which text is cut, best first."""


class Kept(NamedTuple):
    """Group and split of a document in an earlier run's corpus, which a new run keeps.

    Attributes:
        group: Id of the document's group, 16 bytes.
        held_out: Whether the document is validation text.
    """

    group: bytes
    held_out: bool


class GivenTokensError(ValueError):
    """A conversation that the chat template cannot render, or a list that does not hold token ids."""


class Document(NamedTuple):
    """One document that a reader yields.

    Attributes:
        text: Text of the document.
        begins: Whether the document begins a new group. The documents of a group (parts of one long document, or
            neighbours in a running text) are always on the same side of the validation split.
        kept: Group and split in an earlier run's corpus; None if the document does not come from one.
        tokens: Token ids, without special tokens that training adds; None if they are the tokenizer's encoding of the
            text.
        loss_mask: Whether the loss counts each token of a document that is trained on as a whole, such as a
            conversation; None for running text, where it counts all.
    """

    text: str
    begins: bool
    kept: Kept | None = None
    tokens: NDArray[np.int32] | None = None
    loss_mask: NDArray[np.bool_] | None = None


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits on the length of documents.

    Attributes:
        sequence_tokens: Tokens of a training sequence.
        document_tokens: Maximum tokens of a document.
        source_bytes: Size of the source's text (bytes); None if unknown. A group of documents has at most a share of
            it.
    """

    sequence_tokens: int
    document_tokens: int
    source_bytes: int | None = None

    @property
    def running(self) -> int:
        """Target size of a document cut from running text (bytes): about one sequence."""
        return _USUAL_BYTES * min(self.sequence_tokens, self.document_tokens)

    @property
    def part(self) -> int:
        """Target size of a part of a long document (bytes).

        A document of up to one and a half times this size stays whole.
        """
        return _MOST_BYTES * self.document_tokens * 2 // 3

    @property
    def neighbours(self) -> int:
        """Number of consecutive documents of running text that form a group.

        A group is about as long as the longest allowed document. In a small source it is shorter, so that the source
        has several groups.
        """
        most = self.document_tokens // self.sequence_tokens
        if self.source_bytes is not None:
            most = min(most, self.source_bytes // (self.running * _LEAST_GROUPS))
        return max(1, most)

    @property
    def group_bytes(self) -> int:
        """Target bytes of a group of neighbouring paragraphs: as the longest document, or fewer in a small source."""
        most = _USUAL_BYTES * self.document_tokens
        return most if self.source_bytes is None else min(most, self.source_bytes // _LEAST_GROUPS)


class Cutter:
    """Cuts a stream of bytes into pieces of half to one and a half times `about`; a shorter stream is one piece.

    Together the pieces are the whole stream. They do not depend on how the stream is divided into calls of `feed`.

    Args:
        about: Target bytes of a piece, at least 4.
    """

    def __init__(self, about: int) -> None:
        self._about = about
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Add data to the stream and yield the pieces that later data cannot change.

        Exhaust the iterator before the next call.
        """
        self._held += data
        while len(self._held) >= 2 * self._about:
            yield self._take(self._longest)

    def finish(self) -> Iterator[bytes]:
        """End the stream and yield the last pieces. The next `feed` begins another stream."""
        while len(self._held) > self._longest:
            # Leave at least half of `about` for the last piece.
            yield self._take(min(self._longest, len(self._held) - self._about // 2))
        if self._held:
            yield bytes(self._held)
            self._held.clear()

    @property
    def _longest(self) -> int:
        return self._about + self._about // 2

    def _take(self, high: int) -> bytes:
        window = bytes(self._held[: high + 1])
        piece = window[: _best_place(window, self._about // 2, min(self._about, high), high)]
        del self._held[: len(piece)]
        return piece


def cut_document(text: str, about: int) -> Iterator[Document]:
    """Yield a document whole, or as the parts of one group if it is longer than one and a half times `about` bytes."""
    longest = about + about // 2
    if len(text) * 4 <= longest or len(data := text.encode()) <= longest:
        yield Document(text, begins=True)
        return
    yield from grouped(piece.decode() for piece in _cut([data], about))


def cut_stream(data: Iterable[bytes], about: int) -> Iterator[Document]:
    """Cut a text as `cut_document` does, but read it in pieces of UTF-8 and hold only a few of them in memory."""
    longest = about + about // 2
    pieces = iter(data)
    begun = b""
    for piece in pieces:
        begun += piece
        if len(begun) > longest:
            yield from grouped(part.decode() for part in _cut(itertools.chain([begun], pieces), about))
            return
    if (text := begun.decode()) and not text.isspace():
        yield Document(text, begins=True)


def grouped(texts: Iterable[str]) -> Iterator[Document]:
    """Yield the texts as documents of one group; strip leading and trailing line feeds, and drop blank texts."""
    begins = True
    for text in texts:
        if text and not text.isspace():
            yield Document(text.strip("\n"), begins)
            begins = False


def without_surrogates(text: str) -> str:
    """The text with halves of surrogate pairs replaced: JSON can escape them, but UTF-8 cannot encode them."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _cut(data: Iterable[bytes], about: int) -> Iterator[bytes]:
    cutter = Cutter(about)
    for piece in data:
        yield from cutter.feed(piece)
    yield from cutter.finish()


def _best_place(window: bytes, low: int, aim: int, high: int) -> int:
    for pattern in _PLACES:
        ends = [match.end() for match in pattern.finditer(window, low, high)]
        if ends:
            return min(ends, key=lambda end: (abs(end - aim), end))
    at = aim
    while at > max(1, aim - 3) and window[at] & 0xC0 == 0x80:  # the cut would split a UTF-8 character
        at -= 1
    return at
