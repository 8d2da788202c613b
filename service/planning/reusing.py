"""Finds the runs from which a retry takes stages, and what that saves: pure functions of stored configurations.

A stage's fingerprint also covers the user's files, which are not read here. If they have changed since the other run,
its driver makes the stages that depend on them again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.renamed import stored_config
from moedisco_ray.core.errors import MoeDiscoError
from moedisco_ray.core.records.bill import Bill, format_dollars
from moedisco_ray.core.stages import STAGES, alike
from service.domain.reuse import dollars_without, same_storage, usable
from service.domain.starts import by_content

MOST_DONORS = 3
"""Maximum number of runs that are offered to a retry."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A run from which a retry may take stages.

    Attributes:
        document: Its stored configuration.
        stages: Names of the stages that it has finished.
    """

    id: str
    name: str
    document: Mapping[str, Any]
    stages: Sequence[str]


@dataclasses.dataclass(frozen=True)
class Match:
    """A candidate, and the names of its stages that the retry would make alike, in pipeline order."""

    candidate: Candidate
    stages: tuple[str, ...]


def matches(
    config: RunConfig, candidates: Sequence[Candidate], settled: Callable[[RunConfig], RunConfig]
) -> tuple[Match, ...]:
    """The candidates from which a run can take most stages; of equal ones, the first.

    Args:
        config: Configuration of the run.
        candidates: Other runs, the preferred ones first.
        settled: Returns a configuration with everything decided that it leaves open. A candidate for which it raises an
            error is left out.

    Raises:
        MoeDiscoError: The configuration of the run cannot be settled.
    """
    if config.owners or not candidates:
        return ()
    mine = settled(config)
    found = [match for each in candidates if (match := _match(config, mine, each, settled)).stages]
    return tuple(sorted(found, key=lambda match: -len(match.stages))[:MOST_DONORS])


def in_words(match: Match | None, bill: Bill) -> str:
    """Which stages are taken from which run, and what the run costs with and without them."""
    full = "an unknown cost" if bill.dollars is None else format_dollars(bill.dollars)
    if match is None:
        return f"reuses no stage: {full}"
    what = "all stages" if len(match.stages) == len(STAGES) else ", ".join(match.stages)
    left = dollars_without(bill, match.stages)
    cost = "the cost is unknown" if left is None else f"{format_dollars(left)} instead of {full}"
    return f"reuses {what} of {match.candidate.name}: {cost}"


def _match(
    config: RunConfig, mine: RunConfig, candidate: Candidate, settled: Callable[[RunConfig], RunConfig]
) -> Match:
    return Match(candidate, usable(tuple(_agreeing(config, mine, candidate.document, settled)), candidate.stages))


def _agreeing(
    config: RunConfig, mine: RunConfig, document: Mapping[str, Any], settled: Callable[[RunConfig], RunConfig]
) -> Iterator[str]:
    try:
        theirs = stored_config(document)
        # All stages depend on the first, which leaves nothing open. So files of few candidates are read.
        if same_storage(theirs.output, config.output) and _first(theirs) == _first(config):
            yield from alike(settled(theirs), mine)
    except (MoeDiscoError, OSError, ArithmeticError, ValueError):  # of a run that cannot be read, nothing is taken
        return


def _first(config: RunConfig) -> str:
    return STAGES[0].fingerprint(by_content(config), {})
