"""Runs next to each other. Lists of values have one entry per run, in the order of `runs`; null if it has none."""

from __future__ import annotations

from pydantic import JsonValue

from service.domain.states import RunState
from service.schemas.base import Document


class ComparedRun(Document):
    """A run of a comparison, with the held-out figures of the model that it leaves."""

    id: str
    name: str
    owner: str
    state: RunState
    tags: dict[str, str]
    dollars: float
    seconds: float | None
    """Wall-clock seconds over all attempts; null if they are not known."""
    tokens: int
    """Number of tokens that the run trained on so far."""
    loss: float | None
    """Held-out loss (nats per token); null if it was not measured."""
    perplexity: float | None
    bits_per_byte: float | None


class SettingDifference(Document):
    """A setting that differs between the runs."""

    setting: str
    """Dotted path of the setting."""
    values: list[JsonValue]


class StageComparison(Document):
    """One stage of the runs."""

    stage: str
    seconds: list[float | None]
    dollars: list[float | None]
    tokens: list[int | None]
    """Number of tokens that the stage trained on, also in the run that it was taken from; null if it trains nothing."""
    perplexity: list[float | None]


class SourceComparison(Document):
    """Held-out text of one source."""

    source: str
    """`all` for the whole validation text."""
    perplexity: list[float | None]
    bits_per_byte: list[float | None]


class SampleComparison(Document):
    """Continuations of one prompt."""

    prompt: str
    texts: list[str | None]


class Comparison(Document):
    """Runs next to each other."""

    runs: list[ComparedRun]
    same_text: bool
    """Whether the held-out figures are of the same text, so that they can be compared."""
    settings: list[SettingDifference]
    stages: list[StageComparison]
    sources: list[SourceComparison]
    samples: list[SampleComparison]
