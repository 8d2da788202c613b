"""Resolves `run://RUN/...` to a finished run that the caller may see."""

from __future__ import annotations

from sqlalchemy.orm import Session

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.places import Place, words
from moedisco_ray.core.errors import ConfigError
from service.api.answers import owner_filter
from service.api.security import Caller
from service.database import runs, tables
from service.domain.starts import parse, run_places, with_ids
from service.domain.states import RunState

_LISTED = 3


def with_visible_runs(session: Session, caller: Caller, config: RunConfig) -> RunConfig:
    """The configuration with run names replaced by run ids.

    Raises:
        ConfigError: A run does not exist, belongs to another owner (with the same message) or has not finished, or several
            finished runs have the name.
    """
    return with_ids(config, {place.field: _finished(session, caller, place).id for place in run_places(config)})


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
        ids = ", ".join(run.id for run in finished[:_LISTED])
        raise ConfigError(place.field, asked, f"{len(finished)} finished runs have this name; choose one by its id, such as {ids}")
    return finished[0]
