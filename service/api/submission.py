"""Turns a request into a stored run: checks its paths, plans it and stores it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.places import has_credentials, words
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.store.locations import is_uri
from service.api.context import ServiceContext
from service.api.parameters import check_match
from service.api.security import Caller, project_for, run_for
from service.database import (
    audit,
    datasets,
    idempotency,
    policies,
    project_secrets,
    projects,
    quotas,
    reuse,
    runs,
    tables,
)
from service.database.ids import new_id
from service.domain.datasets import hash_in, place_in
from service.domain.datasets import reference as dataset_reference
from service.domain.policies import HIGHEST_PRIORITY, Policy
from service.domain.quotas import check_priority, check_readable, check_room
from service.domain.run_paths import home_of, with_run_directory
from service.domain.starts import DATASET, parse, references
from service.domain.states import RunState
from service.errors import Conflict, KeyReused, NotFound, UnusableRun
from service.planning.reusing import Candidate
from service.planning.task import NeedsStarts, NewRun, Parent, Reference, Start, Task
from service.schemas.mistakes import strict_json

_LISTED_IDS = 3


async def estimated(context: ServiceContext, caller: Caller, body: bytes, *, retry_of: str | None = None) -> bytes:
    """JSON of the `Estimate` for an `EstimateRequest`, or of the `RetryEstimate` for a `RetryRequest`.

    Args:
        context: Context of the application.
        caller: Caller, for whose owner the run is planned.
        body: JSON of the request.
        retry_of: Id of the run to retry; None for an `EstimateRequest`.

    Raises:
        NotFound: There is no such run to retry, or the caller may not see it.
        UserError: The configuration is not valid, or names a run that the caller may not see.
        ServiceError: The request is not valid or against the policy, exceeds a limit, or cannot be planned now.
    """
    policy = await run_in_threadpool(policy_of, context, caller)
    check_readable(policy)
    task = Task("estimate", body, policy, context.roots, context.settings.is_local)
    if retry_of is not None:
        task = await run_in_threadpool(_as_retry, context, caller, task, retry_of)
    found = await planned(context, caller, task)
    assert isinstance(found, bytes)  # noqa: S101 - the outcome of an estimate
    return found


def _as_retry(context: ServiceContext, caller: Caller, task: Task, run_id: str, if_match: str | None = None) -> Task:
    """The task with the run to retry, and with the runs from which the new one may take stages."""
    with context.database.read() as session:
        run = run_for(session, caller, run_id, "see" if task.kind == "estimate" else "edit")
        check_match(if_match, run.version)
        found = reuse.candidates(session, run)
    run.check_repeatable()
    document = {**run.document, "tags": run.tags, "output": str(home_of(home_of(run.location)))}
    parent = Parent(run.id, document, run.priority, run.budget_dollars)
    return dataclasses.replace(task, parent=parent, candidates=tuple(_candidates(found)))


def _candidates(found: Sequence[tables.RunRow]) -> Iterator[Candidate]:
    """The runs whose stages may be reused.

    Users of a driver's machine see its command line, so a run with credentials in its URI is left out.
    """
    for run in found:
        stages = reuse.finished_stages(run)
        with contextlib.suppress(UnusableRun):
            run.check_repeatable()
            if stages and run.unreadable is None and not has_credentials(str(run.location)):
                yield Candidate(run.id, run.name, run.config, stages)


async def planned(context: ServiceContext, caller: Caller, task: Task) -> NewRun | bytes:
    """The outcome of a task, in whose configuration run names are replaced by ids."""
    async with context.planning.places[task.kind].taken(caller.owner):
        with context.prometheus.planning.labels(task.kind).time():
            return await _planned_now(context, caller, task)


async def _planned_now(context: ServiceContext, caller: Caller, task: Task) -> NewRun | bytes:
    found = await context.planning.done(task)
    if not isinstance(found, NeedsStarts):
        return found
    starts = await run_in_threadpool(_visible_starts, context, caller, found.references)
    with tempfile.TemporaryDirectory() as scratch:
        found = await context.planning.done(dataclasses.replace(task, starts=starts, scratch=Path(scratch)))
    assert not isinstance(found, NeedsStarts)  # noqa: S101 - it has them
    return found


def policy_of(context: ServiceContext, caller: Caller) -> Policy:
    """Policy of a caller's owner; an administrator may set any priority."""
    with context.database.read() as session:
        policy = policies.of(session, caller.owner)
    return policy.model_copy(update={"highest_priority": HIGHEST_PRIORITY}) if caller.admin else policy


async def submit(
    context: ServiceContext,
    caller: Caller,
    body: bytes,
    *,
    retry_of: str | None = None,
    key: str | None,
    if_match: str | None = None,
) -> tuple[tables.RunRow, bool]:
    """Store a run, or find the run that an earlier request with the same idempotency key created.

    The key is searched before the request is checked: a repeated request gets its run even if it would be refused by
    now.

    Args:
        context: Context of the application.
        caller: Caller, whose owner becomes the owner of the run.
        body: JSON of a `RunRequest` or, for a retry, of a `RetryRequest`.
        retry_of: Id of the run to retry.
        key: Idempotency-Key of the request; a repeated request must be the same JSON.
        if_match: If-Match of the request, about the run to retry.

    Returns:
        The run, and whether it is new.

    Raises:
        NotFound: There is no such run to retry or project, or the caller may not see it.
        Forbidden: The caller may not submit runs to the project.
        PreconditionFailed: The run to retry has another version.
        UserError: The configuration is not valid, or a run that it starts from was deleted since it was checked.
        KeyReused: The idempotency key was used before with another request.
        Conflict: The run that the key created was deleted.
        AgainstPolicy: The pools are not allowed, the priority is too high, or the owner's quota is used up.
        ServiceError: The request is not valid, exceeds a limit, or cannot be planned now.
    """
    body_hash = b"" if key is None else await run_in_threadpool(_digest, retry_of, body)
    if (
        key is not None
        and (earlier := await run_in_threadpool(_found_again, context, caller, key, body_hash)) is not None
    ):
        return earlier, False
    policy = await run_in_threadpool(policy_of, context, caller)
    check_readable(policy)
    task = Task("submission", body, policy, context.roots, here=context.settings.is_local)
    if retry_of is not None:
        task = await run_in_threadpool(_as_retry, context, caller, task, retry_of, if_match=if_match)
    run = await planned(context, caller, task)
    assert isinstance(run, NewRun)  # noqa: S101 - the outcome of a submission
    # The process that has planned the run has read files of strangers.
    known = {candidate.id for candidate in task.candidates}
    run = dataclasses.replace(run, donors=[donor for donor in run.donors if donor in known])
    row, new = await run_in_threadpool(store, context, caller, run, policy, key=key, body_hash=body_hash)
    if new:
        context.notify(row.id)
    return row, new


def store(
    context: ServiceContext, caller: Caller, run: NewRun, policy: Policy, *, key: str | None, body_hash: bytes
) -> tuple[tables.RunRow, bool]:
    """Store a checked run; see `submit`."""
    now = context.now()
    with context.database.write() as session:
        # Again, because an equal request may have been stored since.
        earlier = _repeated(session, caller, key, body_hash, now)
        if earlier is not None:
            return earlier, False
        _hold_starts(session, run.config)
        check_priority(run.priority, policy)
        check_room(policy, quotas.use_to_change(session, caller.owner, now))
        run_id, project = new_id(), _project(session, caller, run, now)
        projects.hold(session, project)
        project_secrets.check(session, run.config.secrets, project, caller.owner)
        row = runs.insert(
            session,
            run_id=run_id,
            config=with_run_directory(run.config, run_id),
            owner=caller.owner,
            priority=run.priority,
            budget_dollars=run.budget_dollars,
            estimate=run.estimate,
            parent=run.parent,
            now=now,
            notes=run.notes,
            home=context.roots.homes[0] / run_id if is_uri(run.config.output) else None,
            project=project,
        )
        reuse.offer(session, run_id, run.donors)
        if key is not None:
            idempotency.remember(session, owner=caller.owner, key=key, body_hash=body_hash, run_id=run_id, now=now)
        note(
            session,
            caller,
            "run.submit" if run.parent is None else "run.retry",
            run_id,
            now=now,
            detail={"name": row.name},
        )
    return row, True


def _project(session: Session, caller: Caller, run: NewRun, now: float) -> str:
    """Id of the project of a new run: the requested one, else that of the run to retry, else the caller's default."""
    if run.project is not None:
        return project_for(session, caller, run.project, "edit").id
    if run.parent is not None:
        return run_for(session, caller, run.parent, "edit").project
    return projects.default_of(session, caller.owner, now).id


def note(session: Session, caller: Caller, action: str, target: str, *, now: float, detail: dict[str, Any]) -> None:
    """Record a caller's action in the audit log."""
    audit.note(
        session,
        owner=caller.owner,
        token_id=caller.token_id,
        action=action,
        target=target,
        detail=detail,
        address=caller.address,
        now=now,
    )


def _digest(retry_of: str | None, body: bytes) -> bytes:
    """SHA-256 of a request, in which the order of fields and white space do not count.

    Raises:
        BadRequest: The body is not JSON.
        InvalidRequest: The body contains a value that cannot be stored.
    """
    normal = json.dumps([retry_of, strict_json(body) if body else None], sort_keys=True)
    return hashlib.sha256(normal.encode()).digest()


def _visible_starts(context: ServiceContext, caller: Caller, named: Sequence[Reference]) -> dict[str, Start]:
    """The runs and data sets that settings refer to, by the dotted path of each setting.

    Raises:
        ConfigError: A run or data set does not exist or the caller may not see it (both give the same message), a run
            has not finished, or several finished runs have this name.
    """
    starts: dict[str, Start] = {}
    with context.database.read() as session:
        for each in named:
            if each.part == DATASET:
                starts[each.field] = _uploaded(context, session, caller, each)
            else:
                run = _finished(session, caller, each)
                starts[each.field] = Start(run.id, run.location)
    return starts


def _uploaded(context: ServiceContext, session: Session, caller: Caller, wanted: Reference) -> Start:
    digest = hash_in(wanted.key)
    row = datasets.named(session, caller.person, wanted.key.partition("@")[0], digest)
    if row is None:
        raise ConfigError(
            wanted.field,
            wanted.asked,
            "there is no such data set, or it is not yours; `moedisco datasets list` shows yours",
        )
    place = place_in(context.roots.homes, row.hash)
    if place is None:
        raise ConfigError(wanted.field, wanted.asked, "the files of this data set are gone; upload it again")
    return Start(dataset_reference(row.name, row.hash), place, row.bytes)


def _hold_starts(session: Session, config: RunConfig) -> None:
    """Lock the runs and data sets that a configuration reads until this transaction ends, so that none is deleted."""
    for (part, key), place in sorted({parse(place)[::-1]: place for place in references(config)}.items()):
        if part == DATASET:
            digest = hash_in(key) or ""
            datasets.lock(session, digest)
            if not datasets.exists_with(session, digest):
                raise ConfigError(place.field, words(place.value), "this data set was deleted; upload it again")
        elif runs.lock(session, key) is None:
            raise ConfigError(place.field, words(place.value), "this run was deleted; choose another one")


def _finished(session: Session, caller: Caller, reference: Reference) -> tables.RunRow:
    field, asked = reference.field, reference.asked
    found = runs.named(session, reference.key, caller.person)
    if not found:
        raise ConfigError(field, asked, "there is no such run, or it is not yours; `moedisco list` shows yours")
    finished = [run for run in found if run.state == RunState.SUCCEEDED]
    if not finished:
        raise ConfigError(field, asked, f"this run is {found[0].state}; choose a run that has succeeded")
    if len(finished) > 1:
        ids = ", ".join(run.id for run in finished[:_LISTED_IDS])
        raise ConfigError(
            field, asked, f"{len(finished)} finished runs have this name; choose one by its id, such as {ids}"
        )
    return finished[0]


def _found_again(context: ServiceContext, caller: Caller, key: str, body_hash: bytes) -> tables.RunRow | None:
    with context.database.read() as session:
        return _repeated(session, caller, key, body_hash, context.now())


def _repeated(session: Session, caller: Caller, key: str | None, body_hash: bytes, now: float) -> tables.RunRow | None:
    known = None if key is None else idempotency.find(session, caller.owner, key, now)
    if known is None:
        return None
    if known.body_hash != body_hash:
        raise KeyReused("this Idempotency-Key was used with another request; use a new key")
    try:
        return run_for(session, caller, known.run_id)
    except NotFound as error:
        raise Conflict("the run of this Idempotency-Key was deleted, or is not yours; use a new key") from error
