"""Data types of the advice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from benchmarks.study.advice.candidates import Candidate
from benchmarks.study.advice.confidence import Confidence
from benchmarks.study.advice.ranking import Rank
from moedisco_ray.core.config import RunConfig
from moedisco_ray.plan.build import build_plan

MOST_EXTRAPOLATION = 100.0
"""Maximum factor in tokens by which an advised run may exceed the recipe's largest measured run."""


class Goal(BaseModel):
    """A budget to spend or a loss to reach."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    kind: Literal["budget_dollars", "target_loss"]
    value: float
    """Planned training dollars, or validation loss (nats per token)."""

    @property
    def flag(self) -> str:
        """Command-line option that sets this goal."""
        return f"--{self.kind.replace('_', '-')}"


class Change(BaseModel):
    """The present and the advised value of a setting."""

    model_config = ConfigDict(frozen=True)

    now: Any
    advised: Any


class Option(BaseModel):
    """A recipe that was considered."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    title: str
    tokens: int
    """Total training tokens."""
    dollars: float
    """Planned training cost (dollars)."""
    loss: float | None
    """Predicted loss (nats per token); null if another model was measured."""
    ratio: float | None
    """Dollars to reach joint training's loss, relative to joint training; null if losses are predicted."""
    interval: tuple[float, float | None] | None
    """90 % bootstrap interval of the sought figure: `loss` for a budget, `dollars` for a target loss, or `ratio`. Null if no
    measurement shows the effect of chance; the upper end is null if it is unbounded."""
    best_in: float | None
    """Share of the bootstrap samples in which this recipe is the best; null if no measurement shows the effect of chance."""
    runs: int
    seeds: int
    sizes: tuple[int, ...]
    """Token counts at which the recipe was measured."""
    extrapolation: float
    """Extrapolation from the measured runs, as a factor in tokens; 1 within their range."""
    dominated: bool
    """Whether at every measured size of this recipe another one had a lower loss for no more dollars. A dominated recipe is not
    advised, however steep its curve."""


class Advice(BaseModel):
    """The output of `python -m benchmarks.study advise`."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    name: str
    goal: Goal
    sought: Literal["loss", "dollars", "ratio"]
    """Figure that is minimised over the options; the intervals refer to it."""
    options: tuple[Option, ...]
    """All options, the advised one first."""
    settings: dict[str, Change]
    """Changed settings by dotted path."""
    confidence: Confidence
    notes: tuple[str, ...]
    """Runs and recipes that were left out, with reasons."""

    @property
    def advised(self) -> Option:
        """The advised option."""
        return self.options[0]


def option(
    title: str, candidate: Candidate, rank: Rank, tokens: float, dollars: float, *, extrapolation: float, dominated: bool,
    loss: float | None = None, ratio: float | None = None,
) -> Option:
    """The option for a candidate and its rank."""
    recipe, interval = candidate.recipe, rank.interval
    return Option(
        title=title, tokens=_rounded(tokens), dollars=dollars, loss=loss, ratio=ratio,
        interval=interval and (interval[0], interval[1] if math.isfinite(interval[1]) else None), best_in=rank.best_in,
        runs=len(recipe.runs), seeds=len({run.seed for run in recipe.runs}), sizes=tuple(size.tokens for size in recipe.sizes()),
        extrapolation=max(1.0, extrapolation), dominated=dominated)


def changes(config: RunConfig, candidate: Candidate, tokens: int) -> dict[str, Change]:
    """The settings in which the advised configuration differs, in the order of the sections.

    Raises:
        UserError: The configuration does not allow the recipe with this number of tokens.
    """
    advised = candidate.configure(config, tokens)
    build_plan(advised)
    now, then = config.model_dump(mode="json"), advised.model_dump(mode="json")
    paths = ("tokens.total", *candidate.settings, "submodels.sync_every")
    found = {path: Change(now=_at(now, path), advised=_at(then, path)) for path in paths}
    return {path: change for path, change in found.items() if change.now != change.advised}


def distinct_titles(candidates: Sequence[Candidate]) -> list[str]:
    """Unique titles: recipes with the same title get the settings in which they differ."""
    titles = []
    for one in candidates:
        namesakes = [other for other in candidates if other.title == one.title]
        differing = [
            path for path, value in one.settings.items() if any(other.settings.get(path, value) != value for other in namesakes)]
        differences = [f"{path.rsplit('.', 1)[-1]} {one.settings[path]}" for path in differing]
        if any((other.sync_every, other.recipe.rounds) != (one.sync_every, one.recipe.rounds) for other in namesakes):
            differences.append(_sync_schedule(one))
        titles.append(one.title + (f" ({', '.join(differences)})" if differences else ""))
    return titles


def _sync_schedule(candidate: Candidate) -> str:
    if candidate.sync_every is not None:
        return f"rounds of {candidate.sync_every} steps"
    return "no rounds" if candidate.recipe.rounds is None else f"{candidate.recipe.rounds} rounds"


def _rounded(tokens: float) -> int:
    """Round down to four digits, because predictions are less precise than that."""
    digit = 10 ** max(0, math.floor(math.log10(tokens)) - 3)
    return max(1, math.floor(tokens / digit) * digit)


def _at(raw: dict[str, Any], path: str) -> Any:
    value: Any = raw
    for part in path.split("."):
        value = value[part]
    return value
