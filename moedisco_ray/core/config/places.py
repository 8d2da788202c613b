"""Settings that name places: files, folders and URIs that a run reads from or writes to.

A setting is marked where it is declared, such as `path: Annotated[Path, ReadsFrom()]`. `places` finds all marked settings of a
configuration, `with_places` replaces their values.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin
from urllib.parse import parse_qsl, unquote

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

LONGEST_PLACE = 4096
"""Characters of a path or URI, Linux's limit for a path."""

_URI = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):/{1,2}(.*)", re.DOTALL)
_RUN = re.compile(r"^run:/{1,2}")
_SECRET = re.compile(r"key|secret|token|passw|credential|signature|^sig$|^sas$|kerb_?ticket")
_SLASH_IN_PASSWORD = re.compile(r"[^/@:]*:(?!\d+/)[^@]*@")
_NO_SECRET = frozenset({"credential_kind"})

RunPart = Literal["model", "corpus"]
C = TypeVar("C", bound=BaseModel)


class Marker:
    """What `ReadsFrom` and `WritesTo` share: a place holds no credentials and has a bounded length."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The schema of the marked type, with `check_place` before it; JSON has the words of the user."""
        written = core_schema.plain_serializer_function_ser_schema(words, return_schema=core_schema.str_schema(), when_used="json")
        return core_schema.no_info_before_validator_function(check_place, handler(source), serialization=written)


@dataclasses.dataclass(frozen=True)
class ReadsFrom(Marker):
    """Marks a setting that names what the run reads.

    Attributes:
        uris: Whether it may be a URI or `embedded` instead of a local path.
        run_part: The part of a finished run that it may name, as `run://RUN/PART`; None: none.
    """

    uris: bool = False
    run_part: RunPart | None = None


@dataclasses.dataclass(frozen=True)
class WritesTo(Marker):
    """Marks a setting that names what the run writes.

    Attributes:
        what: `runs` are run directories; `checkpoints` may also go to a bucket.
    """

    what: Literal["runs", "checkpoints"]


@dataclasses.dataclass(frozen=True)
class Place:
    """A marked setting of a configuration.

    Attributes:
        field: Its dotted path, such as `corpus.sources.0.path`.
        value: What the configuration says.
        marker: How the setting is marked.
    """

    field: str
    value: str | Path
    marker: ReadsFrom | WritesTo


def words(value: str | Path) -> str:
    """A place as its user wrote it: a path drops one of the two slashes of `run://`."""
    return _RUN.sub("run://", str(value))


def names_a_run(value: str | Path) -> bool:
    """Whether it is a part of a finished run of a control service, `run://RUN/PART`."""
    return _RUN.match(str(value)) is not None


def places(config: BaseModel) -> Iterator[Place]:
    """Every place that a configuration names, in the order of its settings."""
    found: list[Place] = []

    def note(place: Place) -> str | Path:
        found.append(place)
        return place.value

    with_places(config, note)
    yield from found


def with_places(config: C, change: Callable[[Place], str | Path]) -> C:
    """The configuration with `change` applied to every place that it names.

    Args:
        config: Validated; what is put in is not validated again.
        change: Returns the new value, of the setting's own type.
    """
    return _section(config, "", change)


def marker_of(hint: Any) -> ReadsFrom | WritesTo | None:
    """The marker of a type, in `Annotated`, unions, tuples and dicts, but not in sections of their own."""
    if isinstance(hint, FieldInfo):
        return marker_of(Annotated[hint.annotation, *hint.metadata]) if hint.metadata else marker_of(hint.annotation)
    if get_origin(hint) is Annotated:
        inner, *metadata = get_args(hint)
        return next((mark for mark in metadata if isinstance(mark, ReadsFrom | WritesTo)), None) or marker_of(inner)
    return next((mark for mark in map(marker_of, get_args(hint)) if mark is not None), None)


def check_place(value: Any) -> Any:
    """Refuse what no setting may hold, since configurations are stored and shown in clear.

    Raises:
        ValueError: The place is too long, or is a URI with credentials.
    """
    if not isinstance(value, str | Path):
        return value    # the type that is marked refuses it
    if len(str(value)) > LONGEST_PLACE:
        raise ValueError(f"has more than {LONGEST_PLACE} characters; shorten it")
    if has_credentials(str(value)):
        raise ValueError(
            "holds credentials, and a configuration is stored and shown in clear; leave them out, and give them to the machines by "
            "environment variables or an instance role")
    return value


def has_credentials(place: str) -> bool:
    """Whether a URI brings a password, an access key or a signature.

    A user without a password is none, except in `s3://`: Azure names containers so (`abfss://CONTAINER@ACCOUNT...`).
    """
    uri = _URI.match(place)
    if uri is None:
        return False
    scheme, rest = uri[1].lower(), uri[2]
    head, _, options = rest.partition("?")
    authority, *_ = unquote(head).split("/", 1)
    user, at, _ = authority.rpartition("@")
    if ":" in user or (at and scheme == "s3") or _SLASH_IN_PASSWORD.match(unquote(head)):
        return True
    names = (name.lower().replace("-", "_") for name, _ in parse_qsl(options, keep_blank_values=True))
    return any(_SECRET.search(name) and name not in _NO_SECRET for name in names)


def _section(section: C, prefix: str, change: Callable[[Place], str | Path]) -> C:
    changes = {}
    for name, info in type(section).model_fields.items():
        old = getattr(section, name)
        new = _replaced(old, marker_of(info), prefix + name, change)
        if new is not old:
            changes[name] = new
    return section.model_copy(update=changes) if changes else section


def _replaced(value: Any, marker: ReadsFrom | WritesTo | None, field: str, change: Callable[[Place], str | Path]) -> Any:
    if isinstance(value, BaseModel):
        return _section(value, f"{field}.", change)
    if isinstance(value, list | tuple):
        new = type(value)(_replaced(entry, marker, f"{field}.{i}", change) for i, entry in enumerate(value))
        return new if any(a is not b for a, b in zip(new, value, strict=True)) else value
    if isinstance(value, dict):
        entries = {key: _replaced(entry, marker, f"{field}.{key}", change) for key, entry in value.items()}
        return entries if any(entries[key] is not value[key] for key in value) else value
    if marker is not None and isinstance(value, str | Path):
        return change(Place(field, value, marker))
    return value
