"""Tasks and outcomes as JSON.

A process that has read a stranger's files must not make the service unpickle anything.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import UserError
from moedisco_ray.core.store.locations import Location, is_uri
from service.domain.path_sandbox import Roots
from service.domain.policies import Policy
from service.errors import (
    AgainstPolicy,
    BadRequest,
    InvalidRequest,
    NotFound,
    ServiceError,
    StorageUnavailable,
    TooCostly,
)
from service.planning.reusing import Candidate
from service.planning.task import NeedsStarts, NewRun, Outcome, Parent, Reference, Start, Task
from service.schemas.mistakes import mistakes_in

_ERRORS: tuple[type[ServiceError], ...] = (BadRequest, NotFound, StorageUnavailable, TooCostly)
"""Errors that consist of their detail."""


def task_to_message(task: Task) -> bytes:
    """A line of JSON, and then the request's body as it arrived, which may be large."""
    head = json.dumps(
        {
            "kind": task.kind,
            "here": task.here,
            "policy": task.policy.model_dump_json(),
            "roots": {name: list(map(_place, places)) for name, places in vars(task.roots).items()},
            "parent": None if task.parent is None else dataclasses.asdict(task.parent),
            "candidates": [dataclasses.asdict(each) for each in task.candidates],
            "starts": None
            if task.starts is None
            else {field: [start.id, _place(start.location), start.bytes] for field, start in task.starts.items()},
            "scratch": None if task.scratch is None else str(task.scratch),
        }
    )
    return b"\n".join([head.encode(), task.body])


def task_from_message(content: bytes) -> Task:
    head, _, body = content.partition(b"\n")
    raw = json.loads(head)
    roots: dict[str, Any] = {name: tuple(map(_location, places)) for name, places in raw["roots"].items()}
    return Task(
        kind=raw["kind"],
        body=body,
        here=raw["here"],
        policy=Policy.model_validate_json(raw["policy"]),
        roots=Roots(**roots),
        parent=None if raw["parent"] is None else Parent(**raw["parent"]),
        candidates=tuple(Candidate(**each) for each in raw["candidates"]),
        starts=None
        if raw["starts"] is None
        else {field: Start(key, _location(place), size) for field, (key, place, size) in raw["starts"].items()},
        scratch=None if raw["scratch"] is None else Path(raw["scratch"]),
    )


def outcome_to_json(outcome: Outcome) -> bytes:
    if isinstance(outcome, bytes):
        return json.dumps({"estimate": outcome.decode()}).encode()
    if isinstance(outcome, NeedsStarts):
        return json.dumps({"references": [dataclasses.astuple(each) for each in outcome.references]}).encode()
    run = {field.name: getattr(outcome, field.name) for field in dataclasses.fields(outcome)}
    return json.dumps({"run": {**run, "config": outcome.config.model_dump(mode="json")}}).encode()


def error_to_json(error: UserError | ServiceError) -> bytes:
    """Encode an error that refuses a task.

    Raises:
        TypeError: The error is none that planning raises on purpose.
    """
    if isinstance(error, UserError):
        return json.dumps({"invalid": mistakes_in(error)}).encode()
    if isinstance(error, InvalidRequest):
        return json.dumps({"invalid": error.mistakes}).encode()
    if isinstance(error, AgainstPolicy):
        return json.dumps({"policy": [error.field, error.value, error.remedy]}).encode()
    if isinstance(error, _ERRORS):
        return json.dumps({"refused": [type(error).__name__, error.detail]}).encode()
    raise TypeError(f"{type(error).__name__}: {error}")


def failure_to_json(text: str) -> bytes:
    """Encode an unforeseen error, which the service logs."""
    return json.dumps({"failed": text}).encode()


def outcome_from_json(content: bytes) -> Outcome:
    """Decode an outcome, or raise the error that was encoded.

    Raises:
        ServiceError: The task was refused.
        RuntimeError: Planning failed for another reason.
    """
    [(kind, value)] = json.loads(content).items()
    match kind:
        case "estimate":
            return str(value).encode()
        case "references":
            return NeedsStarts(tuple(Reference(*each) for each in value))
        case "run":
            return NewRun(**{**value, "config": RunConfig.model_validate(value["config"])})
        case "invalid":
            raise InvalidRequest([(field, message) for field, message in value])
        case "policy":
            raise AgainstPolicy(*value)
        case "refused":
            raise next(error for error in _ERRORS if error.__name__ == value[0])(value[1])
        case _:
            raise RuntimeError(str(value))


def _place(place: Any) -> list[Any]:
    """A path or a text, with its type: a path to a folder and a URI are different, and so are a path and its text."""
    return ["path" if isinstance(place, Path) else "text", str(place)]


def _location(written: list[str]) -> Location:
    kind, text = written
    return Path(text) if kind == "path" and not is_uri(text) else text
