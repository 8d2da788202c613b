"""How JSON documents are stored: with a version, and read such that one bad document spoils no query.

A document that another version wrote, or that is damaged, reads as an `Unreadable`, an empty document that says why.
There are no converters of earlier forms: a change of a document's form increments its version in `tables`.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import from_json
from sqlalchemy import JSON, Dialect, TypeDecorator
from sqlalchemy.sql.operators import OperatorType

from moedisco_ray.core.records.bill import Bill

VERSION = "stored_version"
"""Key of a stored document that holds its version."""
EARLIER = "recorded by an earlier version, cannot be shown in full"
DAMAGED = "its record is damaged, cannot be shown in full"


class Unreadable(dict[str, Any]):
    """An empty document, in place of one that this version cannot read.

    Attributes:
        why: Why it cannot be read, as users see it.
        stored: What is stored instead of a valid document.
    """

    def __init__(self, why: str, stored: object) -> None:
        super().__init__()
        self.why = why
        self.stored = stored


class StageEntry(BaseModel):
    """Progress of one stage, as stored."""

    status: Literal["waiting", "running", "done", "reused", "failed"]
    started: float | None
    seconds: float | None


class Reached(BaseModel):
    """Furthest progress of a run, as stored."""

    stages: list[str] = []
    steps: dict[str, int] = {}


class Ended(BaseModel):
    """Final event of a driver, as stored; other fields are the driver's own."""

    type: str
    time: float = 0.0


class Progress(BaseModel):
    """Form of a run's `progress`."""

    stages: dict[str, StageEntry] = {}
    current: str | None = None
    reached: Reached = Reached()
    ended: Ended | None = None


class Planned(BaseModel):
    """Form of a run's `estimate`: the part that is shown."""

    bill: Bill | None = None


class Stored(TypeDecorator[Any]):
    """A column of JSON documents of one form.

    Args:
        form: Type that valid documents have.
        version: Version to write into the documents, which must be objects; None for values that need none, such as
            tags.
        any_version: Whether documents of other versions are read too.
        often: Whether the same documents are read again and again. They are shared then, and must not be changed.
    """

    impl = JSON
    cache_ok = True

    def __init__(
        self, form: Any, version: int | None = None, *, any_version: bool = False, often: bool = False
    ) -> None:
        super().__init__()
        self.form = form
        self.version = version
        self.any_version = any_version
        self.often = often

    def coerce_compared_value(self, op: OperatorType | None, value: Any) -> Any:
        """Compare as JSON does, so that SQL can look into documents."""
        return self.impl_instance.coerce_compared_value(op, value)

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:  # noqa: ARG002 - SQLAlchemy's signature
        """Add the version."""
        return value if value is None or self.version is None else {**value, VERSION: self.version}

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:  # noqa: ARG002 - SQLAlchemy's signature
        """Parse the text and remove the version, or return an `Unreadable`."""
        reader = read_often if self.often and isinstance(value, str | bytes) else read
        return reader(value, self.form, self.version, self.any_version)


def as_stored(text: Any) -> Any:
    """What an engine does with JSON: nothing, because `Stored` parses it."""
    return text


def read(stored: Any, form: Any, version: int | None, any_version: bool) -> Any:
    """What is stored, without its version; an `Unreadable` where an error would fail queries of all runs."""
    try:
        value = from_json(stored) if isinstance(stored, str | bytes) else stored
    except ValueError:
        return Unreadable(DAMAGED, stored)
    if version is not None:
        if not isinstance(value, dict):
            return Unreadable(DAMAGED, value)
        if value.pop(VERSION, None) != version and not any_version:
            return Unreadable(EARLIER, value)
    try:
        _adapter(form).validate_python(value)
    except ValidationError:
        return Unreadable(DAMAGED, value)
    return value


read_often = functools.lru_cache(maxsize=512)(read)
"""Lists and the background's rounds read the same documents every second; to parse them would take most of the time."""


@functools.cache
def _adapter(form: Any) -> TypeAdapter[Any]:
    return TypeAdapter(form)
