"""Cut text into documents of bounded length, at the best places, in bounded memory.

Lengths are bytes of UTF-8: before a tokenizer exists (it may be trained on this very text) tokens are estimated by a
constant, so that where a text is cut depends on the text and the configuration alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_USUAL_BYTES = 3
"""Bytes per token assumed where documents are cut to about one sequence. Measured with byte-level BPE of 2,000 to 16,000
entries on prose, code and Japanese: 2 to 4.3."""
_MOST_BYTES = 6
"""Bytes per token that hardly any tokenizer exceeds: a document shorter than this many times its limit is only cut once its
tokens are known."""

_LEAST_GROUPS = 40
"""Groups that a source of running text is divided into at least, so that a small one has some for each side of the split."""

_PLACES = (
    re.compile(rb"\n(?:[ \t\r]*\n)+"),                                                             # blank lines
    re.compile(rb"\n"),                                                                            # line ends
    re.compile(rb"[.!?][\"')\]]*[ \t]|\xe3\x80\x82|\xef\xbc\x81|\xef\xbc\x9f"),                    # sentence ends, also CJK
    re.compile(rb"[ \t]"),                                                                         # between words
)
"""Where to cut, best first; each match is left at the end of the first part."""


class Kept(NamedTuple):
    """What the run that stored a document decided over it.

    Attributes:
        group: The id of its group, 16 bytes.
        held_out: Whether it is validation text.
    """

    group: bytes
    held_out: bool


class Document(NamedTuple):
    """One document as a reader gives it.

    Attributes:
        text: The text.
        begins: Whether a new group of documents begins with it. The documents of a group (parts of one long document, or
            neighbours in a running text) are never on different sides of the validation split.
        kept: What an earlier run decided over it; None: it comes from no run's corpus.
    """

    text: str
    begins: bool
    kept: Kept | None = None


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long documents are.

    Attributes:
        sequence_tokens: Tokens of a training sequence.
        document_tokens: Most tokens of a document.
        source_bytes: Bytes of all text of the source; None: unknown, and not needed to cut.
    """

    sequence_tokens: int
    document_tokens: int
    source_bytes: int | None = None

    @property
    def running(self) -> int:
        """Bytes of a document that is cut out of running text: about one sequence."""
        return _USUAL_BYTES * min(self.sequence_tokens, self.document_tokens)

    @property
    def part(self) -> int:
        """Bytes of a part of a document that is too long; a document of up to one and a half of it stays whole."""
        return _MOST_BYTES * self.document_tokens * 2 // 3

    @property
    def neighbours(self) -> int:
        """How many neighbouring documents of a running text form a group: as many as one longest document, fewer in short texts."""
        most = self.document_tokens // self.sequence_tokens
        if self.source_bytes is not None:
            most = min(most, self.source_bytes // (self.running * _LEAST_GROUPS))
        return max(1, most)

    @property
    def group_bytes(self) -> int:
        """Bytes of neighbouring paragraphs that form a group: as many as one longest document, fewer in short texts."""
        most = _USUAL_BYTES * self.document_tokens
        return most if self.source_bytes is None else min(most, self.source_bytes // _LEAST_GROUPS)


class Cutter:
    """Cuts a stream of bytes into pieces of half to one and a half times `about`; a shorter stream is one piece.

    The pieces together are the stream. They do not depend on how the stream is fed.

    Args:
        about: Bytes of a piece, at least 4.
    """

    def __init__(self, about: int) -> None:
        self._about = about
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take more of the stream; give the pieces that are certain. Consume it before feeding again."""
        self._held += data
        while len(self._held) >= 2 * self._about:
            yield self._take(self._longest)

    def finish(self) -> Iterator[bytes]:
        """End the stream; give what is left. The next `feed` begins another stream."""
        while len(self._held) > self._longest:
            # Both halves get at least half of `about`.
            yield self._take(min(self._longest, len(self._held) - self._about // 2))
        if self._held:
            yield bytes(self._held)
            self._held.clear()

    @property
    def _longest(self) -> int:
        return self._about + self._about // 2

    def _take(self, high: int) -> bytes:
        window = bytes(self._held[:high + 1])
        piece = window[:_best_place(window, self._about // 2, min(self._about, high), high)]
        del self._held[:len(piece)]
        return piece


def cut_document(text: str, about: int) -> Iterator[Document]:
    """A document as it is, or, longer than one and a half times `about` bytes, its parts as one group."""
    longest = about + about // 2
    if len(text) * 4 <= longest or len(data := text.encode()) <= longest:
        yield Document(text, begins=True)
        return
    yield from grouped(piece.decode() for piece in _whole(data, about))


def grouped(texts: Iterable[str]) -> Iterator[Document]:
    """The texts as one group, without line breaks at their ends and without those that are only white space."""
    begins = True
    for text in texts:
        if text and not text.isspace():
            yield Document(text.strip("\n"), begins)
            begins = False


def _whole(data: bytes, about: int) -> Iterator[bytes]:
    cutter = Cutter(about)
    yield from cutter.feed(data)
    yield from cutter.finish()


def _best_place(window: bytes, low: int, aim: int, high: int) -> int:
    for pattern in _PLACES:
        ends = [match.end() for match in pattern.finditer(window, low, high)]
        if ends:
            return min(ends, key=lambda end: (abs(end - aim), end))
    at = aim
    while at > max(1, aim - 3) and window[at] & 0xC0 == 0x80:     # inside a character
        at -= 1
    return at
