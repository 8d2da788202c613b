"""Settings that name files, folders and URIs that a run reads or writes.

A setting is marked in its declaration, such as `path: Annotated[Path, ReadsFrom()]`. `places` finds all marked settings
of a configuration, `with_places` replaces their values.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin
from urllib.parse import parse_qsl, unquote

from pydantic import BaseModel, GetCoreSchemaHandler, ValidationInfo
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from moedisco_ray.core.store.hub import HUB, is_hub, is_hub_name
from moedisco_ray.core.store.locations import is_uri

LONGEST_PLACE = 4096
"""Maximum length of a path or URI (characters): Linux's limit for a path."""

_URI = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):/{1,2}(.*)", re.DOTALL)
_URI_START = re.compile(r"[A-Za-z0-9+.-]+:")
_SCHEMES = ("s3", "gs", "abfs", "abfss", "hdfs")
_REFERENCE = re.compile(r"^(run|dataset):/{1,2}")
_SECRET = re.compile(r"key|secret|token|passw|credential|signature|^sig$|^sas$|kerb_?ticket")
_SLASH_IN_PASSWORD = re.compile(r"[^/@:]*:(?!\d+/)[^@]*@")
_NO_SECRET = frozenset({"credential_kind"})

_ONE_SLASH = re.compile(r"(s3|gs|gcs|abfs|abfss|file):")

RunPart = Literal["model", "corpus"]
C = TypeVar("C", bound=BaseModel)


class Marker:
    """Base class of `ReadsFrom` and `WritesTo`.

    A marked setting rejects places that are too long or hold credentials.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """The schema of the marked type, which runs `check_place` first; JSON keeps the user's spelling."""
        written = core_schema.plain_serializer_function_ser_schema(
            words, return_schema=core_schema.str_schema(), when_used="json"
        )
        return core_schema.no_info_before_validator_function(check_place, handler(source), serialization=written)


@dataclasses.dataclass(frozen=True)
class ReadsFrom(Marker):
    """Marks a setting that names a path or URI from which the run reads.

    Attributes:
        uris: Whether the setting may hold a URI or `embedded` instead of a local path.
        run_part: Part of a finished run that the setting may name as `run://RUN/PART`; None if it may name no run. A
            setting that may name a `corpus` may also name a data set.
        hub: Whether the setting may name a model of the Hugging Face hub as `hf://ORG/NAME`.
    """

    uris: bool = False
    run_part: RunPart | None = None
    hub: bool = False


@dataclasses.dataclass(frozen=True)
class WritesTo(Marker):
    """Marks a setting that names a path or URI to which the run writes.

    Attributes:
        what: What the run writes there: `runs` (run directories) or `checkpoints`.
    """

    what: Literal["runs", "checkpoints"]


@dataclasses.dataclass(frozen=True)
class Place:
    """The value of a marked setting.

    Attributes:
        field: Dotted path of the setting, such as `corpus.sources.0.path`.
        value: The path or URI.
        marker: `ReadsFrom` if the run reads from the place, `WritesTo` if it writes there.
    """

    field: str
    value: str | Path
    marker: ReadsFrom | WritesTo


def as_location(value: Path | str, info: ValidationInfo) -> Path | str:
    """A setting's path, or its URI as it is written.

    Raises:
        ValueError: It is a URI that names no storage.
    """
    if is_uri(value):
        if not (is_storage(str(value)) or str(value).startswith("file:///")):
            raise ValueError(
                f"{info.field_name} {value!r} names no storage; give a folder, or a URI such as s3://BUCKET/FOLDER"
            )
        return value
    if _ONE_SLASH.match(str(value)):
        raise ValueError(
            f"{info.field_name} {str(value)!r} is no URI; write two slashes after the colon, such as s3://BUCKET/FOLDER"
        )
    return Path(value)


def as_model(value: Path | str, info: ValidationInfo) -> Path | str:
    """Like `as_location`, for a setting that may name the model of a finished run as `run://RUN/model`."""
    return words(value) if names_a_run(value) else as_location(value, info)


def as_start(value: Path | str, info: ValidationInfo) -> Path | str:
    """Like `as_model`, for a setting that may also name a model of the Hugging Face hub as `hf://ORG/NAME`.

    Raises:
        ValueError: An `hf:` URI names no model, or has a revision.
    """
    if not str(value).startswith("hf:"):
        return as_model(value, info)
    if not is_hub(value) or not is_hub_name(str(value).removeprefix(HUB)):
        raise ValueError(f"must read {HUB}ORG/NAME; write a branch, a tag or a commit in `revision`")
    return value


def words(value: str | Path) -> str:
    """A place as the user wrote it: restores `run://` and `dataset://`, which `Path` shortens to one slash."""
    return _REFERENCE.sub(r"\1://", str(value))


def names_a_run(value: str | Path) -> bool:
    """Whether a place is part of a finished run, `run://RUN/PART`."""
    return words(value).startswith("run://")


def names_a_dataset(value: str | Path) -> bool:
    """Whether a place is a data set of a control service, `dataset://NAME` or `dataset://NAME@sha256:HASH`."""
    return words(value).startswith("dataset://")


def is_reference(value: str | Path) -> bool:
    """Whether only a control service knows the files of a place: it names a run or a data set."""
    return _REFERENCE.match(str(value)) is not None


def places(config: BaseModel) -> Iterator[Place]:
    """All places of a configuration, in the order of its settings."""
    found: list[Place] = []

    def note(place: Place) -> str | Path:
        found.append(place)
        return place.value

    with_places(config, note)
    yield from found


def with_places(config: C, change: Callable[[Place], str | Path]) -> C:
    """A copy of the configuration in which every marked path or URI has the value that `change` returns for it.

    Args:
        config: A validated configuration; the new values are not validated.
        change: Returns the new value of a marked setting, of the same type as the old one.
    """
    return _section(config, "", change)


def marker_of(hint: Any) -> ReadsFrom | WritesTo | None:
    """Find the marker in a type hint, also inside unions, tuples and dicts, but not in nested sections."""
    if isinstance(hint, FieldInfo):
        return marker_of(Annotated[hint.annotation, *hint.metadata]) if hint.metadata else marker_of(hint.annotation)
    if get_origin(hint) is Annotated:
        inner, *metadata = get_args(hint)
        return next((mark for mark in metadata if isinstance(mark, ReadsFrom | WritesTo)), None) or marker_of(inner)
    return next((mark for mark in map(marker_of, get_args(hint)) if mark is not None), None)


def check_place(value: Any) -> Any:
    """Reject a place that is too long, or holds credentials: configurations are stored and shown in plain text.

    Raises:
        ValueError: The place is too long, or is a URI with credentials.
    """
    if not isinstance(value, str | Path):
        return value  # the validation of the setting's type handles it
    if len(str(value)) > LONGEST_PLACE:
        raise ValueError(f"has more than {LONGEST_PLACE} characters; shorten it")
    if has_credentials(str(value)):
        raise ValueError(
            "holds credentials, and a configuration is stored and shown in clear; leave them out, and give them to the "
            "machines by environment variables or an instance role"
        )
    return value


def has_credentials(place: str) -> bool:
    """Whether a URI holds a password, an access key or a signature.

    A user name alone counts only in `s3://`, where it is an access key: elsewhere it may be an Azure container
    (`abfss://CONTAINER@ACCOUNT...`).
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


def is_storage(place: str) -> bool:
    """Whether a place is a URI of a store that a run can write to."""
    scheme, sign, rest = place.partition("://")
    return bool(sign) and scheme in _SCHEMES and rest[:1] not in ("", "/", "?")


def check_storage(place: str) -> str:
    """Reject a place that is neither a folder nor a URI of a store that a run can write to.

    Raises:
        ValueError: The place is empty, or such a URI.
    """
    if not place or (_URI_START.match(place) and not is_storage(place)):
        raise ValueError(
            f"names no storage; give a folder, or a URI such as s3://BUCKET/FOLDER ({', '.join(_SCHEMES)})"
        )
    return place


def _section(section: C, prefix: str, change: Callable[[Place], str | Path]) -> C:
    changes = {}
    for name, info in type(section).model_fields.items():
        old = getattr(section, name)
        new = _replaced(old, marker_of(info), prefix + name, change)
        if new is not old:
            changes[name] = new
    return section.model_copy(update=changes) if changes else section


def _replaced(
    value: Any, marker: ReadsFrom | WritesTo | None, field: str, change: Callable[[Place], str | Path]
) -> Any:
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
