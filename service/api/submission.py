"""Turns a request into a stored run: checks its paths, plans it and stores it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import JsonValue, ValidationError
from sqlalchemy.orm import Session

from moedisco_ray.core.config import LocalInit, Optimizer, RunConfig
from moedisco_ray.core.config.load import check_files
from moedisco_ray.core.config.mistakes import first_mistake
from moedisco_ray.core.config.places import Place, words
from moedisco_ray.core.config.starts import at_newest
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.locations import is_uri
from moedisco_ray.core.read_roots import reading_within
from moedisco_ray.plan import Plan, build_plan
from moedisco_ray.plan.machine import known_machine
from service.api.answers import owner_filter
from service.api.context import ServiceContext
from service.api.security import Caller, visible_run
from service.database import audit, idempotency, policies, quotas, runs, tables
from service.database.ids import new_id
from service.domain.path_sandbox import check_links, check_parts, sandboxed
from service.domain.policies import HIGHEST_PRIORITY, Policy
from service.domain.quotas import check_pools, check_priority, check_room, priced
from service.domain.run_paths import home_of, with_run_directory
from service.domain.starts import located, parse, run_places, with_ids
from service.domain.states import RunState
from service.errors import Conflict, KeyReused, NotFound
from service.run_storage import copy_model_files, documents_at
from service.schemas import RetryRequest, RunRequest

_LISTED_IDS = 3
MOST_SEQUENCES = 65_536
"""Maximum number of sequences per training step, because planning tries all divisors of the requested number."""
MOST_BYTES = 32 * 2**20
"""Maximum total size of the files that are read to plan one request (bytes): enough for the largest public tokenizers."""


@dataclasses.dataclass(frozen=True)
class NewRun:
    """A checked run that is not stored yet.

    Attributes:
        config: Checked configuration with absolute paths.
        priority: Priority in the queue; higher starts first.
        budget_dollars: Dollars at which the run stops; None for no budget.
        parent: Id of the run that this one retries.
        notes: Remarks for the owner, such as replaced prices.
    """

    config: RunConfig
    plan: Plan
    priority: int
    budget_dollars: float | None
    parent: str | None
    notes: list[str]


def checked(
    context: ServiceContext, caller: Caller, config: RunConfig, prices: Mapping[str, float],
) -> tuple[RunConfig, Plan, list[str]]:
    """Check and plan a configuration.

    No file outside of the operator's roots is read.

    Args:
        context: Context of the application.
        caller: Caller, who must have access to the runs that the configuration refers to.
        config: Configuration as requested.
        prices: Operator's prices in dollars per worker-hour, by custom resource.

    Returns:
        The configuration with absolute paths, run ids and the operator's prices; its plan; and notes on the prices.

    Raises:
        UserError: A path is absent or outside of the roots, a run is not visible, or the settings cannot be planned.
    """
    config, notes = priced(sandboxed(config, context.roots), prices)
    with context.database.read() as session:
        config = _with_visible_runs(session, caller, config)
        locations = {run_id: runs.location(session, run_id) for run_id in (parse(place)[0] for place in run_places(config))}
    check_parts(config, locations.get)
    check_links(config, context.roots)
    with tempfile.TemporaryDirectory() as scratch:
        found, read = located(config, locations.get, documents_at, functools.partial(copy_model_files, folder=Path(scratch)))
        with reading_within(context.roots.readable(*read)):
            return config, _planned(at_newest(found), context.settings.is_local), notes


def _planned(config: RunConfig, here: bool) -> Plan:
    _check_sizes(config)
    check_files(config)
    for field, optimizer in (("submodels", config.submodels.optimizer), ("finetune", config.finetune.optimizer)):
        _check_batch(f"{field}.optimizer.batch_tokens", optimizer, config)
    try:
        plan = build_plan(config, known_machine(config, here=here))
    except ArithmeticError as error:
        raise _too_large() from error
    full = plan.joint_training.cost
    if not all(map(math.isfinite, (plan.training_dollars, plan.training_hours, full.dollars, full.hours))):
        raise _too_large()
    return plan


def new_run(context: ServiceContext, caller: Caller, request: RunRequest, policy: Policy) -> NewRun:
    """Check and plan the run that a request describes.

    Raises:
        UserError: `checked` refuses the configuration.
        AgainstPolicy: The owner may not use the pools.
    """
    check_pools(request.config, policy)
    config, plan, notes = checked(context, caller, request.config, policy.prices)
    return NewRun(config, plan, priority=request.priority, budget_dollars=request.budget_dollars, parent=None, notes=notes)


def retried_run(context: ServiceContext, caller: Caller, run_id: str, request: RetryRequest, policy: Policy) -> NewRun:
    """Check and plan a retry: a new run with the configuration of an existing run and the requested changes.

    A priority taken from the existing run is capped at the owner's highest.

    Raises:
        NotFound: There is no such run, or the caller may not see it.
        UserError: A change is not valid, or `checked` refuses the configuration.
        AgainstPolicy: The owner may not use the pools.
    """
    with context.database.read() as session:
        parent = visible_run(session, caller, run_id)
    raw = {**parent.document, "tags": parent.tags, "output": str(home_of(home_of(parent.location)))}
    for path, value in request.changes.items():
        raw = changed(raw, path, value)
    try:
        again = RunRequest.model_validate({"config": raw}).config
    except ValidationError as error:
        raise first_mistake([{**mistake, "loc": mistake["loc"][1:]} for mistake in error.errors()]) from error
    check_pools(again, policy)
    config, plan, notes = checked(context, caller, again, policy.prices)
    priority = min(parent.priority, policy.highest_priority) if request.priority is None else request.priority
    budget = request.budget_dollars if "budget_dollars" in request.model_fields_set else parent.budget_dollars
    return NewRun(config, plan, priority=priority, budget_dollars=budget, parent=parent.id, notes=notes)


def policy_of(context: ServiceContext, caller: Caller) -> Policy:
    """Policy of a caller's owner; an administrator may set any priority."""
    with context.database.read() as session:
        policy = policies.of(session, caller.owner)
    return policy.model_copy(update={"highest_priority": HIGHEST_PRIORITY}) if caller.admin else policy


def submit(
    context: ServiceContext, caller: Caller, make: Callable[[Policy], NewRun], *, key: str | None, body_hash: bytes,
) -> tuple[tables.RunRow, bool]:
    """Store a run, or find the run that an earlier request with the same idempotency key created.

    The key is searched before `make` is called: a repeated request gets its run even if the same request would be refused by now.

    Args:
        context: Context of the application.
        caller: Caller, whose owner becomes the owner of the run.
        make: Checks and plans the run under its owner's policy.
        key: Idempotency-Key of the request.
        body_hash: Hash of the request; a repeated request must have the same hash.

    Returns:
        The run, and whether it is new.

    Raises:
        ConfigError: A run that the new run starts from was deleted since it was checked.
        KeyReused: The idempotency key was used before with another request.
        Conflict: The run that the key created was deleted.
        AgainstPolicy: The priority is too high, or the owner's quota is used up.
    """
    now = context.now()
    with context.database.read() as session:
        earlier = _repeated(session, caller, key, body_hash, now)
    if earlier is not None:
        return earlier, False
    policy = policy_of(context, caller)
    run = make(policy)
    with context.database.write() as session:
        # Again, because an equal request may have been stored since.
        earlier = _repeated(session, caller, key, body_hash, now)
        if earlier is not None:
            return earlier, False
        _hold_starts(session, run.config)
        check_priority(run.priority, policy)
        check_room(policy, quotas.use_to_change(session, caller.owner, now))
        run_id = new_id()
        row = runs.insert(
            session, run_id=run_id, config=with_run_directory(run.config, run_id), owner=caller.owner,
            priority=run.priority, budget_dollars=run.budget_dollars, estimate=run.plan.model_dump(mode="json"),
            parent=run.parent, now=now, notes=run.notes,
            home=context.roots.homes[0] / run_id if is_uri(run.config.output) else None)
        if key is not None:
            idempotency.remember(session, owner=caller.owner, key=key, body_hash=body_hash, run_id=run_id, now=now)
        note(session, caller, "run.submit" if run.parent is None else "run.retry", run_id, now=now, detail={"name": row.name})
    context.notify(run_id)
    return row, True


def note(session: Session, caller: Caller, action: str, target: str, *, now: float, detail: dict[str, Any]) -> None:
    """Record a caller's action in the audit log."""
    audit.note(
        session, owner=caller.owner, token_id=caller.token_id, action=action, target=target, detail=detail, address=caller.address,
        now=now)


def digest(*parts: str) -> bytes:
    """SHA-256 of a request, given in parts."""
    return hashlib.sha256("\n".join(parts).encode()).digest()


def _with_visible_runs(session: Session, caller: Caller, config: RunConfig) -> RunConfig:
    """The configuration with run names replaced by run ids.

    Raises:
        ConfigError: A run does not exist or belongs to another owner (both give the same message), a run has not finished, or
            several finished runs have this name.
    """
    return with_ids(config, {place.field: _finished(session, caller, place).id for place in run_places(config)})


def _hold_starts(session: Session, config: RunConfig) -> None:
    """Lock the runs that a configuration reads until this transaction ends, so that none is deleted before the run is stored."""
    for run_id, place in sorted({parse(place)[0]: place for place in run_places(config)}.items()):
        if runs.lock(session, run_id) is None:
            raise ConfigError(place.field, words(place.value), "this run was deleted; choose another one")


def _finished(session: Session, caller: Caller, place: Place) -> tables.RunRow:
    named, asked = parse(place)[0], words(place.value)
    owner = owner_filter(caller)
    found = [run for run in [runs.get(session, named)] if run is not None and owner in (None, run.owner)]
    found = found or runs.named(session, named, owner)
    if not found:
        raise ConfigError(place.field, asked, "there is no such run, or it is not yours; `moedisco list` shows yours")
    finished = [run for run in found if run.state == RunState.SUCCEEDED]
    if not finished:
        raise ConfigError(place.field, asked, f"this run is {found[0].state}; choose a run that has succeeded")
    if len(finished) > 1:
        ids = ", ".join(run.id for run in finished[:_LISTED_IDS])
        raise ConfigError(place.field, asked, f"{len(finished)} finished runs have this name; choose one by its id, such as {ids}")
    return finished[0]


def _check_sizes(config: RunConfig) -> None:
    """Refuse a configuration whose files are too large to read during a request."""
    found = [(f"evaluation.lm_eval.{i}", path) for i, path in enumerate(config.evaluation.lm_eval)]
    folders = [("tokenizer.path", config.tokenizer.directory)]
    if isinstance(config.model.init, LocalInit):
        folders.append((config.model.init.setting, config.model.init.directory))
    found += [
        (field, folder / name) for field, folder in folders if folder is not None
        for name in ("config.json", "tokenizer.json", "vocab.json")]
    total = 0
    for field, path in found:
        with contextlib.suppress(OSError):
            total += path.stat().st_size
        if total > MOST_BYTES:
            raise ConfigError(field, str(path), f"is too large: a request reads {MOST_BYTES >> 20} MiB; choose smaller files")


def _check_batch(field: str, optimizer: Optimizer, config: RunConfig) -> None:
    if optimizer.batch_tokens > MOST_SEQUENCES * config.corpus.sequence_length:
        raise ConfigError(field, optimizer.batch_tokens, f"is more than {MOST_SEQUENCES} sequences per step; lower it")


def _too_large() -> ConfigError:
    return ConfigError("model", None, "is too large to plan; choose smaller sizes")


def _repeated(session: Session, caller: Caller, key: str | None, body_hash: bytes, now: float) -> tables.RunRow | None:
    known = None if key is None else idempotency.find(session, caller.owner, key, now)
    if known is None:
        return None
    if known.body_hash != body_hash:
        raise KeyReused("this Idempotency-Key was used with another request; use a new key")
    try:
        return visible_run(session, caller, known.run_id)
    except NotFound as error:
        raise Conflict("the run of this Idempotency-Key was deleted; use a new key") from error


def changed(raw: dict[str, Any], path: str, value: JsonValue) -> dict[str, Any]:
    """Copy a configuration with one setting changed; numbers in the path select list entries: `corpus.sources.0.weight`.

    Raises:
        ConfigError: The path selects a list entry that does not exist, or a part of a value that is not a section.
    """
    document: dict[str, Any] = _changed(raw, path.split("."), value, path)
    return document


def _changed(node: Any, parts: Sequence[str], value: JsonValue, path: str) -> Any:
    if not parts:
        return value
    first, *rest = parts
    if isinstance(node, list):
        if not (first.isascii() and first.isdigit() and len(first) < 6 and int(first) < len(node)):
            raise ConfigError(path, first, f"is not an entry of the list, which has {len(node)} entries, numbered from 0")
        place = int(first)
        return [*node[:place], _changed(node[place], rest, value, path), *node[place + 1:]]
    if node is not None and not isinstance(node, dict):
        raise ConfigError(path, None, f"the setting above {first!r} is not a section")
    section = node or {}
    return {**section, first: _changed(section.get(first), rest, value, path)}
