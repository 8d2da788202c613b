"""Checks and plans the run that a request describes: plain data in, plain data out, in a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import JsonValue, TypeAdapter, ValidationError

from moedisco_ray.core.config import LocalInit, Optimizer, RunConfig
from moedisco_ray.core.config.load import with_files
from moedisco_ray.core.config.mistakes import first_mistake
from moedisco_ray.core.config.places import words
from moedisco_ray.core.config.start_files import named_tokenizer, start_directory
from moedisco_ray.core.config.starts import looked_up
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.records.measurements import THIS_MACHINE
from moedisco_ray.core.store.locations import Location
from moedisco_ray.core.store.read_roots import reading_within
from moedisco_ray.plan import Plan, build_plan
from moedisco_ray.plan.machine import known_machine
from moedisco_ray.plan.measured_machines import with_stored_measurements
from moedisco_ray.plan.resolve import resolve
from moedisco_ray.plan.text_size import Lister
from service.domain.datasets import hash_in, place_in
from service.domain.path_sandbox import Roots, check_links, check_parts, sandboxed
from service.domain.policies import Policy
from service.domain.quotas import check_pools, priced
from service.domain.reuse import dollars_without
from service.domain.starts import located, parse, references, with_ids
from service.errors import InvalidRequest
from service.planning.reusing import Candidate, Match, in_words, matches
from service.run_storage import copy_model_files, documents_at
from service.schemas import Estimate, EstimateRequest, RetryEstimate, RetryRequest, Reused, RunRequest
from service.schemas.mistakes import converted, parsed

MOST_SEQUENCES = 65_536
"""Maximum number of sequences per training step, because planning tries all divisors of the requested number."""
MOST_BYTES = 32 * 2**20
"""Maximum total size of the files that are read to plan one request (bytes): enough for the largest public
tokenizers."""


@dataclasses.dataclass(frozen=True)
class Parent:
    """The run that a retry repeats.

    Attributes:
        document: Its configuration, with the current tags and with the folder of its home as `output`.
    """

    id: str
    document: Mapping[str, Any]
    priority: int
    budget_dollars: float | None


@dataclasses.dataclass(frozen=True)
class Start:
    """A finished run or a data set that the caller may read, and that a configuration refers to.

    Attributes:
        id: Id of the run, or `NAME@sha256:HASH` of the data set.
        location: Path or URI of the run directory, or the folder of the data set.
        bytes: Size of the data set's files; None for a run.
    """

    id: str
    location: Location
    bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A request to plan.

    Attributes:
        kind: What to return: the JSON of an estimate, or the run.
        body: JSON of the request: an `EstimateRequest`, a `RunRequest`, or with `parent` a `RetryRequest`.
        policy: Policy of the caller's owner.
        roots: Directories and buckets that runs may read and write.
        here: Whether workers without GPUs run on the service's machine.
        parent: Run to retry.
        candidates: Runs from which a retry may take stages, the preferred ones first; the run to retry is among them.
        starts: Runs and data sets that the configuration refers to, by the dotted path of each setting; None before
            they are known.
        scratch: Empty folder for copies of models at URIs; with None, `starts` has no run at a URI.
    """

    kind: Literal["estimate", "submission"]
    body: bytes
    policy: Policy
    roots: Roots
    here: bool
    parent: Parent | None = None
    candidates: Sequence[Candidate] = ()
    starts: Mapping[str, Start] | None = None
    scratch: Path | None = None


@dataclasses.dataclass(frozen=True)
class NewRun:
    """A checked run that is not stored yet.

    Attributes:
        config: Checked configuration with absolute paths.
        estimate: Plan of the run, as JSON data.
        priority: Priority in the queue; higher starts first.
        budget_dollars: Dollars at which the run stops; None for no budget.
        parent: Id of the run that this one retries.
        notes: Remarks for the owner, such as replaced prices.
        donors: Ids of the runs from which it may take stages, the best first.
        project: Id or name of its project; None for the one of the run to retry, or the caller's own.
    """

    config: RunConfig
    estimate: dict[str, Any]
    priority: int
    budget_dollars: float | None
    parent: str | None
    notes: list[str]
    donors: list[str] = dataclasses.field(default_factory=list)
    project: str | None = None


@dataclasses.dataclass(frozen=True)
class Reference:
    """A setting that refers to a run or a data set.

    Attributes:
        field: Dotted path of the setting.
        asked: Value of the setting, as the user wrote it.
        key: Id or name of the run; name of the data set, with `@sha256:HASH` if that is given.
        part: Part of the run, or `dataset`.
    """

    field: str
    asked: str
    key: str
    part: str


@dataclasses.dataclass(frozen=True)
class NeedsStarts:
    """The settings that refer to runs and data sets; the task is repeated with `Task.starts`."""

    references: tuple[Reference, ...]


Outcome = NewRun | bytes | NeedsStarts
"""The run to store, the JSON of an `Estimate`, or the runs that must be known first."""


@dataclasses.dataclass(frozen=True)
class _Checked:
    """A configuration with absolute paths, run ids and the operator's prices, and what follows from it.

    Attributes:
        notes: Remarks on the prices.
        donors: Runs from which it may take stages, the best first.
    """

    config: RunConfig
    plan: Plan
    notes: list[str]
    donors: tuple[Match, ...]


def done(task: Task) -> Outcome:
    """The run to store or, for an estimate, the JSON of an `Estimate`; or the runs that must be known first.

    No file outside of the operator's roots is read.

    Raises:
        UserError: A path is absent or outside of the roots, or the settings cannot be planned.
        BadRequest: The body is not JSON.
        InvalidRequest: The body does not match its schema.
        AgainstPolicy: The owner may not use the pools.
        StorageUnavailable: The URI of a run cannot be reached.
    """
    if task.parent is not None:
        return _retried(task, task.parent, parsed(RetryRequest, task.body or b"{}"))
    if task.kind == "estimate":
        found = _checked(task, parsed(EstimateRequest, task.body).config)
        if isinstance(found, NeedsStarts):
            return found
        return Estimate.model_construct(**dict(found.plan), notes=tuple(found.notes)).model_dump_json().encode()
    asked = parsed(RunRequest, task.body)
    found = _checked(task, asked.config)
    return _new_run(task, found, priority=asked.priority, budget_dollars=asked.budget_dollars, project=asked.project)


def changed(raw: dict[str, Any], path: str, value: JsonValue) -> dict[str, Any]:
    """Copy a configuration with one setting changed; numbers in its path select list entries.

    An example of a path is `corpus.sources.0.weight`.

    Raises:
        ConfigError: The path selects a list entry that does not exist, or a part of a value that is not a section.
    """
    document: dict[str, Any] = _changed(raw, path.split("."), value, path)
    return document


def _retried(task: Task, parent: Parent, request: RetryRequest) -> Outcome:
    """The new run, or its estimate.

    A priority taken from the existing run is capped at the owner's highest.
    """
    raw = dict(parent.document)
    for path, value in request.changes.items():
        raw = changed(raw, path, value)
    try:
        if mistakes := converted(TypeAdapter(RunRequest), {"config": raw}):
            raise InvalidRequest(mistakes)
        again = RunRequest.model_validate({"config": raw}).config
    except ValidationError as error:
        raise first_mistake([{**mistake, "loc": mistake["loc"][1:]} for mistake in error.errors()]) from error
    offered = {"auto": task.candidates, "parent": [each for each in task.candidates if each.id == parent.id]}
    found = _checked(task, again, offered.get(request.reuse, ()))
    if task.kind == "estimate" and not isinstance(found, NeedsStarts):
        return _retry_estimate(found)
    priority = min(parent.priority, task.policy.highest_priority) if request.priority is None else request.priority
    budget = request.budget_dollars if "budget_dollars" in request.model_fields_set else parent.budget_dollars
    return _new_run(task, found, priority=priority, budget_dollars=budget)


def _retry_estimate(found: _Checked) -> bytes:
    """JSON of a `RetryEstimate`, which counts the stages of the best run alone.

    Another run that has a later stage may have made it from other files.
    """
    best, bill = next(iter(found.donors), None), found.plan.bill
    reused = (
        () if best is None else (Reused(run=best.candidate.id, name=best.candidate.name, stages=list(best.stages)),)
    )
    return (
        RetryEstimate.model_construct(
            **dict(found.plan),
            notes=tuple(found.notes),
            reuses=reused,
            dollars_with_reuse=dollars_without(bill, () if best is None else best.stages),
            reuse_in_words=in_words(best, bill),
        )
        .model_dump_json()
        .encode()
    )


def _new_run(
    task: Task,
    found: _Checked | NeedsStarts,
    *,
    priority: int,
    budget_dollars: float | None,
    project: str | None = None,
) -> NewRun | NeedsStarts:
    if isinstance(found, NeedsStarts):
        return found
    return NewRun(
        found.config,
        found.plan.model_dump(mode="json"),
        priority=priority,
        budget_dollars=budget_dollars,
        parent=None if task.parent is None else task.parent.id,
        notes=found.notes,
        donors=[match.candidate.id for match in found.donors],
        project=project,
    )


def _checked(task: Task, config: RunConfig, candidates: Sequence[Candidate] = ()) -> _Checked | NeedsStarts:
    check_pools(config, task.policy)
    config, notes = priced(sandboxed(config, task.roots), task.policy.prices)
    named = tuple(Reference(place.field, words(place.value), *parse(place)) for place in references(config))
    if named and task.starts is None:
        return NeedsStarts(named)
    starts = task.starts or {}
    config = with_ids(config, {field: start.id for field, start in starts.items()})
    locations = {start.id: start.location for start in starts.values()}

    def location_of(key: str) -> Location | None:
        # Equal data sets have one folder, also under the name that a run has from which stages may be taken.
        digest = hash_in(key)
        return locations.get(key) if digest is None else place_in(task.roots.homes, digest)

    check_parts(config, location_of)
    check_links(config, task.roots)
    model_at = functools.partial(copy_model_files, folder=task.scratch or Path())

    def place(other: RunConfig) -> tuple[RunConfig, Sequence[Location]]:
        return located(other, location_of, documents_at, model_at)

    found, read = place(config)
    with reading_within(task.roots.readable(*read)):
        plan = _planned(found, task.here, _sizes_of(starts.values()))
        return _Checked(config, plan, notes, matches(config, candidates, lambda other: _settled(other, place)))


def _settled(config: RunConfig, place: Callable[[RunConfig], tuple[RunConfig, Sequence[Location]]]) -> RunConfig:
    """A configuration as the driver makes it: with paths in place of run ids, and with nothing left open."""
    found, _ = place(config)
    _check_sizes(found)
    return resolve(looked_up(found, recorded=False)).config


def _sizes_of(starts: Iterable[Start]) -> Lister:
    """A function that gives the size of a source from a data set; other files are not looked at."""
    sizes = {str(start.location): start.bytes for start in starts}
    return lambda _, source: sizes.get(source.path)


def _planned(config: RunConfig, here: bool, listed: Lister) -> Plan:
    _check_sizes(config)
    config = with_files(config, recorded=False)
    for field, optimizer, _ in config.trainings:
        _check_batch(f"{field}.optimizer.batch_tokens", optimizer, config)
    try:
        # What `moedisco doctor` measured on this machine changes the plan, and not the configuration that runs.
        measured, how = with_stored_measurements(config, THIS_MACHINE) if here else (config, {})
        machine = known_machine(config, here=here, listed=listed)
        plan = build_plan(measured, machine.model_copy(update={"measured": how}))
    except ArithmeticError as error:
        raise _too_large() from error
    full = plan.joint_training.cost
    if not all(map(math.isfinite, (plan.training_dollars, plan.training_hours, full.dollars, full.hours))):
        raise _too_large()
    return plan


def _check_sizes(config: RunConfig) -> None:
    """Refuse a configuration whose files are too large to read during a request."""
    found = [(f"evaluation.lm_eval.{i}", path) for i, path in enumerate(config.evaluation.lm_eval)]
    folders = [("tokenizer.path", named_tokenizer(config.tokenizer))]
    if isinstance(config.model.init, LocalInit):
        folders.append((config.model.init.setting, start_directory(config.model.init)))
    found += [
        (field, folder / name)
        for field, folder in folders
        if folder is not None
        for name in ("config.json", "tokenizer.json", "vocab.json")
    ]
    total = 0
    for field, path in found:
        with contextlib.suppress(OSError):
            total += path.stat().st_size
        if total > MOST_BYTES:
            raise ConfigError(
                field, str(path), f"is too large: a request reads {MOST_BYTES >> 20} MiB; choose smaller files"
            )


def _check_batch(field: str, optimizer: Optimizer, config: RunConfig) -> None:
    if optimizer.batch_tokens > MOST_SEQUENCES * config.corpus.sequence_length:
        raise ConfigError(field, optimizer.batch_tokens, f"is more than {MOST_SEQUENCES} sequences per step; lower it")


def _too_large() -> ConfigError:
    return ConfigError("model", None, "is too large to plan; choose smaller sizes")


def _changed(node: Any, parts: Sequence[str], value: JsonValue, path: str) -> Any:
    if not parts:
        return value
    first, *rest = parts
    if isinstance(node, list):
        if not (first.isascii() and first.isdigit() and len(first) < 6 and int(first) < len(node)):
            raise ConfigError(
                path, first, f"is not an entry of the list, which has {len(node)} entries, numbered from 0"
            )
        place = int(first)
        return [*node[:place], _changed(node[place], rest, value, path), *node[place + 1 :]]
    if node is not None and not isinstance(node, dict):
        raise ConfigError(path, None, f"the setting above {first!r} is not a section")
    section = node or {}
    return {**section, first: _changed(section.get(first), rest, value, path)}
