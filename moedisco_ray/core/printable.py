"""Text of other people, made safe for a terminal, a table or a log: names, prompts, samples, errors, lines of logs."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from typing import IO, cast

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that move the cursor, clear the screen, write the clipboard, or show text in another order than it has;
and halves of characters, which cannot be encoded. Newline and tab are not among them."""
_NOTHING = re.compile("")
_BAR = re.compile("\r|\n*(?:\x1b\\[A)*")
"""What progress bars write before their text: back to the start of the line, or to the line of another bar."""


def printable(text: str) -> str:
    r"""The text with control characters as escapes such as `\u001b`, which a JSON string may contain too."""
    return _CONTROL.sub(_escape, text)


def one_line(text: str) -> str:
    r"""The text with control characters and newlines escaped: a name must not look like another line of the output."""
    return printable(text).replace("\n", "\\n")


def _escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found.group()):04x}"


class PrintableStream(io.TextIOBase):
    """A text stream that shows control characters as escapes.

    Attributes:
        rich_proxied_file: The stream behind it. Rich's consoles look for this name, and write there.

    Args:
        stream: The stream to write to.
        kept: Control characters that stay at the beginning of a written text.
    """

    def __init__(self, stream: IO[str], kept: re.Pattern[str] = _NOTHING) -> None:
        self.rich_proxied_file = stream
        self._kept = kept

    def write(self, text: str) -> int:
        """Write a text; return its number of characters."""
        begin = found.end() if (found := self._kept.match(text)) is not None else 0
        self.rich_proxied_file.write(text[:begin] + printable(text[begin:]))
        return len(text)

    def flush(self) -> None:
        self.rich_proxied_file.flush()

    @property
    def closed(self) -> bool:
        return self.rich_proxied_file.closed

    def fileno(self) -> int:
        """File descriptor of the stream behind."""
        return self.rich_proxied_file.fileno()

    def isatty(self) -> bool:
        return self.rich_proxied_file.isatty()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]  # a property of the stream behind
        return getattr(self.rich_proxied_file, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str:  # type: ignore[override]  # a property of the stream behind
        """How the stream behind treats characters that its encoding lacks."""
        return getattr(self.rich_proxied_file, "errors", None) or "strict"


def printed(stream: IO[str]) -> IO[str]:
    """The stream itself if it already shows control characters as escapes, or one that does."""
    return stream if isinstance(stream, PrintableStream) else cast("IO[str]", PrintableStream(stream))


def escape_output() -> None:
    """Let everything that this process prints from now on show control characters as escapes, tracebacks included."""
    sys.stdout, sys.stderr = printed(sys.stdout), printed(sys.stderr)


@contextlib.contextmanager
def progress_bars() -> Iterator[None]:
    """Let libraries draw progress bars on standard error in the block; names of files and other texts are escaped."""
    stream = PrintableStream(getattr(sys.stderr, "rich_proxied_file", sys.stderr), _BAR)
    with contextlib.redirect_stderr(stream):
        yield
