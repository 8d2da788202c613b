"""Which runs a list shows, in which order, and where its next page begins; nothing here reads the database."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import difflib
import json
import math
import re
from collections.abc import Mapping
from typing import Literal, cast, get_args

from service.domain.access import Person
from service.domain.run_paths import is_id
from service.domain.states import RunState
from service.errors import InvalidRequest

Figure = Literal["dollars", "hours", "tokens", "perplexity", "bits_per_byte", "held_out_loss", "active_parameters"]
"""A number of a run that lists are filtered and sorted by."""
Field = Literal["created", "name", "state", "owner"] | Figure
Operator = Literal["<", "<=", ">", ">=", "="]

FIGURES: tuple[Figure, ...] = get_args(Figure)
FIELDS: tuple[Field, ...] = ("created", "name", "state", "owner", *FIGURES)
TEXTS = frozenset({"name", "state", "owner"})
WHOLE = frozenset({"tokens", "active_parameters"})
NULLABLE = frozenset(FIGURES) - {"dollars"}

NO_CURSOR = "is not the `next_cursor` of a page; begin without a cursor"
"""What is wrong with a text that is no cursor of any list."""

_CONDITION = re.compile(r"\s*(\w+)\s*(<=|>=|<|>|=)\s*([+-]?[\d.]+(?:[eE][+-]?\d+)?)\s*", re.ASCII)
_MOST_SHOWN = 80
_LARGEST = 2**63 - 1
_EXAMPLES = "such as perplexity<30, tokens>=1e9 or dollars<5"


@dataclasses.dataclass(frozen=True)
class Condition:
    """A comparison that a listed run passes; a run without the figure passes none."""

    field: Figure
    operator: Operator
    value: float


@dataclasses.dataclass(frozen=True)
class Order:
    """Field by which a list is sorted. Runs without a value come last in both directions."""

    field: Field = "created"
    descending: bool = True

    def __str__(self) -> str:
        return f"-{self.field}" if self.descending else self.field


NEWEST = Order()


@dataclasses.dataclass(frozen=True)
class Position:
    """The last run of a page: its value of the list's field, and its id, which orders runs with equal values."""

    value: str | float | None
    run_id: str


@dataclasses.dataclass(frozen=True)
class Selection:
    """Filters of a list; a run must pass all.

    Attributes:
        person: Person who may see the runs; None for runs of all projects.
        owner: Owner of the runs; None for all owners.
        project: Id or name of the runs' project; None for all projects.
        states: States to include; empty for all.
        name: Part of the run's name, case-insensitive.
        tags: Tags that the runs must all have.
        created_after: Earliest time of submission (seconds since the epoch).
        created_before: Time before which the runs were submitted (seconds since the epoch).
        where: Conditions on figures.
    """

    person: Person | None = None
    owner: str | None = None
    project: str | None = None
    states: tuple[RunState, ...] = ()
    name: str | None = None
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    created_after: float | None = None
    created_before: float | None = None
    where: tuple[Condition, ...] = ()


def parse_condition(text: str) -> Condition:
    """Read a filter such as `perplexity<30`.

    Raises:
        InvalidRequest: The text is no filter.
    """
    found = _CONDITION.fullmatch(text)
    if found is None:
        raise _mistake("where", text, f"must compare a figure with a number, {_EXAMPLES}")
    field, operator, number = found.groups()
    if field not in FIGURES:
        raise _mistake("where", text, _no_such("figure", field, FIGURES))
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise _mistake("where", text, f"{number} is not a number of usual size; write it {_EXAMPLES}")
    return Condition(cast("Figure", field), cast("Operator", operator), value)


def parse_order(text: str) -> Order:
    """Read an order such as `perplexity`, or `-created` for descending.

    Raises:
        InvalidRequest: Lists cannot be sorted by this field.
    """
    field = text.removeprefix("-")
    if field not in FIELDS:
        raise _mistake("order_by", text, _no_such("field", field, FIELDS))
    return Order(field, text.startswith("-"))


def to_cursor(order: Order, position: Position) -> str:
    """Opaque text from which `parse_cursor` reads the position."""
    content = json.dumps([str(order), position.value, position.run_id], separators=(",", ":"))
    return base64.urlsafe_b64encode(content.encode()).decode().rstrip("=")


def parse_cursor(order: Order, text: str) -> Position:
    """Read the cursor of a list in this order.

    Raises:
        InvalidRequest: The text is no cursor, or that of a list in another order.
    """
    try:
        content = json.loads(base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True))
        made_for, value, run_id = content
    except (binascii.Error, ValueError, TypeError, RecursionError) as error:
        raise _no_cursor(text) from error
    if not (isinstance(made_for, str) and isinstance(run_id, str) and is_id(run_id)):
        raise _no_cursor(text)
    if made_for != str(order):
        raise _mistake("cursor", text, f"belongs to a list in another order than {order}; begin without a cursor")
    if not _is_value(order.field, value):
        raise _no_cursor(text)
    return Position(value, run_id)


def _is_value(field: Field, value: object) -> bool:
    if value is None:
        return field in NULLABLE
    if field in TEXTS:
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if field in WHOLE:
        return isinstance(value, int) and abs(value) <= _LARGEST
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= _LARGEST


def _no_cursor(text: str) -> InvalidRequest:
    return _mistake("cursor", text, NO_CURSOR)


def _no_such(kind: str, field: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(field[:_MOST_SHOWN], known, n=1)
    return f"no such {kind}; did you mean {close[0]}?" if close else f"no such {kind}; known are {', '.join(known)}"


def _mistake(field: str, text: str, remedy: str) -> InvalidRequest:
    return InvalidRequest([(field, f"{text[:_MOST_SHOWN]!r}: {remedy}")])
