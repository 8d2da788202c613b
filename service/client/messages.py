"""Server-sent events, from bytes that may be cut anywhere (WHATWG HTML, 9.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

COMMENT = ":"


@dataclasses.dataclass(frozen=True)
class Message:
    """One message.

    Attributes:
        kind: Its `event` field; `COMMENT` for a comment, which services send to say that they are there.
        id: None where it has none.
    """

    kind: str
    data: str
    id: str | None


class Lines:
    """Cuts bytes into lines, which end with a line feed, a carriage return, or both. What is not UTF-8 is replaced."""

    def __init__(self) -> None:
        self._rest = b""
        self._after_return = False

    def take(self, chunk: bytes) -> Iterator[str]:
        """The lines that the chunk completes."""
        if self._after_return and chunk:  # a line feed may have been cut off its carriage return
            chunk, self._after_return = chunk.removeprefix(b"\n"), False
        if chunk.endswith(b"\r"):
            self._after_return = True
        # bytes.splitlines, unlike str.splitlines, knows no other line ends: U+2028 stays inside a line.
        *whole, self._rest = (self._rest + chunk + b"\0").splitlines()
        self._rest = self._rest[:-1]
        for line in whole:
            yield line.decode(errors="replace")

    def rest(self) -> str | None:
        """What was begun and not ended; None: nothing."""
        return self._rest.decode(errors="replace") if self._rest else None


class Messages:
    """Puts lines together into messages; fields it does not know are passed over."""

    def __init__(self) -> None:
        self._lines = Lines()
        self._kind = ""
        self._id: str | None = None
        self._data: list[str] = []

    def take(self, chunk: bytes) -> Iterator[Message]:
        """The messages that the chunk completes; one that the connection cut short is never seen."""
        for line in self._lines.take(chunk):
            if line.startswith(":"):
                yield Message(COMMENT, line[1:], None)
            elif line:
                self._field(*line.partition(":")[::2])
            else:
                if self._data or self._kind:
                    yield Message(self._kind or "message", "\n".join(self._data), self._id)
                self._kind, self._id, self._data = "", None, []

    def _field(self, name: str, value: str) -> None:
        value = value.removeprefix(" ")
        match name:
            case "event":
                self._kind = value
            case "data":
                self._data.append(value)
            case "id":
                self._id = value
            case _:
                pass
