"""A request and how its answer is read, apart from what carries them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Generator, Mapping
from typing import Generic, Literal, TypeVar
from urllib.parse import quote

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Sink = Callable[[bytes], None]
"""Takes a piece of a body."""

IDEMPOTENCY_KEY = "Idempotency-Key"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        headers: Names in lower case.
        body: Empty where the body went to a sink.
    """

    status: int
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    body: bytes = b""


@dataclasses.dataclass(frozen=True)
class Call(Generic[T_co]):
    """One request.

    Attributes:
        parse: Reads a successful answer.
        path: Below the service's URL, percent-encoded.
        content: JSON.
        silence: Longest time without a byte, in seconds; None: any.
    """

    method: Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
    path: str
    parse: Callable[[Answer], T_co]
    params: tuple[tuple[str, str], ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    content: bytes | None = None
    silence: float | None = 30.0

    @property
    def repeatable(self) -> bool:
        """Whether sending it twice does what sending it once does."""
        return self.method == "GET" or any(name == IDEMPOTENCY_KEY for name, _ in self.headers)


@dataclasses.dataclass(frozen=True)
class Send:
    """A step of a dialogue: wait, send, hand back the answer.

    Attributes:
        pause: Seconds to wait first.
        sink: Given the head of a successful answer, says where its body goes; None: into the answer.
    """

    call: Call[object]
    pause: float = 0.0
    sink: Callable[[Answer], Sink] | None = None


Dialogue = Generator[Send, Answer, T]
"""Everything a method does, as steps: the clients differ only in how they carry a step out. A transport error is thrown in."""


def segment(text: str) -> str:
    """A text as one segment of a path."""
    return quote(text, safe="")


def query(**params: object) -> tuple[tuple[str, str], ...]:
    """Query parameters; None is left out, a list is repeated, a truth value is `true` or `false`."""
    pairs: list[tuple[str, str]] = []
    for name, value in params.items():
        values = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
        pairs += [(name, str(item).lower() if isinstance(item, bool) else str(item)) for item in values]
    return tuple(pairs)


def body(**fields: object) -> bytes:
    """A JSON object; None is left out. What it may hold is judged in one place: the service."""
    return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()
