"""The form of an advice."""

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
"""Nothing is said of runs that are larger than a measured one by more than this factor."""


class Goal(BaseModel):
    """What is given."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    kind: Literal["budget_dollars", "target_loss"]
    value: float
    """Dollars of training, as planned; or nats per token on the validation documents."""

    @property
    def flag(self) -> str:
        """Its option on the command line."""
        return f"--{self.kind.replace('_', '-')}"


class Change(BaseModel):
    """A setting as it is, and as it is advised to be."""

    model_config = ConfigDict(frozen=True)

    now: Any
    advised: Any


class Option(BaseModel):
    """A recipe that was weighed."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    title: str
    tokens: int
    """To train on, in all."""
    dollars: float
    """Of training, as planned."""
    loss: float | None
    """Predicted, nats per token; null where the measured model is another one."""
    ratio: float | None
    """Dollars for the loss that joint training reaches, as a multiple of joint training's; null where losses are predicted."""
    interval: tuple[float, float | None] | None
    """Holds nine of ten resamplings of what is sought: of `loss` for a budget, of `dollars` for a target, of `ratio`. Its upper end
    is null where there is none, and where no measurement shows the effect of chance."""
    best_in: float | None
    """Share of the resamplings in which this recipe is the best; null likewise."""
    runs: int
    seeds: int
    sizes: tuple[int, ...]
    """Tokens that it was measured with."""
    extrapolation: float
    """Distance of the figure from its measured runs: the factor in tokens, 1 between them."""
    dominated: bool
    """Whether another recipe had a lower loss for no more dollars wherever this one was measured: it is then not advised, however
    steep its curve."""


class Advice(BaseModel):
    """What `python -m benchmarks.study advise` says."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    name: str
    goal: Goal
    sought: Literal["loss", "dollars", "ratio"]
    """What is the least of all options: which of their figures the intervals are of."""
    options: tuple[Option, ...]
    """The advised one first."""
    settings: dict[str, Change]
    """Dotted path of each setting that it changes."""
    confidence: Confidence
    notes: tuple[str, ...]
    """What was set aside, and why."""

    @property
    def advised(self) -> Option:
        """The option to take."""
        return self.options[0]


def option(
    title: str, candidate: Candidate, rank: Rank, tokens: float, dollars: float, *, extrapolation: float, dominated: bool,
    loss: float | None = None, ratio: float | None = None,
) -> Option:
    """A candidate as an option."""
    recipe, interval = candidate.recipe, rank.interval
    return Option(
        title=title, tokens=_rounded(tokens), dollars=dollars, loss=loss, ratio=ratio,
        interval=interval and (interval[0], interval[1] if math.isfinite(interval[1]) else None), best_in=rank.best_in,
        runs=len(recipe.runs), seeds=len({run.seed for run in recipe.runs}), sizes=tuple(size.tokens for size in recipe.sizes()),
        extrapolation=max(1.0, extrapolation), dominated=dominated)


def changes(config: RunConfig, candidate: Candidate, tokens: int) -> dict[str, Change]:
    """The settings in which the advised configuration differs, in the order of the sections.

    Raises:
        UserError: The configuration does not allow this number of tokens of the recipe.
    """
    advised = candidate.configure(config, tokens)
    build_plan(advised)
    now, then = config.model_dump(mode="json"), advised.model_dump(mode="json")
    paths = ("tokens.total", *candidate.settings, "submodels.sync_every")
    found = {path: Change(now=_at(now, path), advised=_at(then, path)) for path in paths}
    return {path: change for path, change in found.items() if change.now != change.advised}


def distinct_titles(candidates: Sequence[Candidate]) -> list[str]:
    """Titles that distinguish recipes of one title, by the settings that differ."""
    titles = []
    for one in candidates:
        namesakes = [other for other in candidates if other.title == one.title]
        differing = [
            path for path, value in one.settings.items() if any(other.settings.get(path, value) != value for other in namesakes)]
        told = [f"{path.rsplit('.', 1)[-1]} {one.settings[path]}" for path in differing]
        if any((other.sync_every, other.recipe.rounds) != (one.sync_every, one.recipe.rounds) for other in namesakes):
            told.append(_meetings(one))
        titles.append(one.title + (f" ({', '.join(told)})" if told else ""))
    return titles


def _meetings(candidate: Candidate) -> str:
    if candidate.sync_every is not None:
        return f"rounds of {candidate.sync_every} steps"
    return "no rounds" if candidate.recipe.rounds is None else f"{candidate.recipe.rounds} rounds"


def _rounded(tokens: float) -> int:
    """Down to four digits: what is predicted is never as exact."""
    digit = 10 ** max(0, math.floor(math.log10(tokens)) - 3)
    return max(1, math.floor(tokens / digit) * digit)


def _at(raw: dict[str, Any], path: str) -> Any:
    value: Any = raw
    for part in path.split("."):
        value = value[part]
    return value
