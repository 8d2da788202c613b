"""Results of the quality benchmark as typed records, one per (cell, seed): the raw rows, and the published figures."""

from __future__ import annotations

from benchmarks.study.compare.records import Budget, ComparedRows
from moedisco_ray.core.config import PoolName
from moedisco_ray.core.records import Record

SCHEMA_VERSION = 1


class Setting(Record):
    """What a (cell, seed) was measured with."""

    model: dict[str, int | bool]
    """Sizes of the model."""
    tokens: int
    """Training tokens of joint training."""
    seed: int
    recipe: str
    """Digest of the default recipe."""
    low_over_high: float
    """Price of a FLOP on the low-memory pool relative to the high-memory pool."""


class CellResult(ComparedRows):
    """A raw result: the rows of one (cell, seed), and how they were measured."""

    command: str
    commits: tuple[str, ...]
    """Commits that measured the rows, in order."""
    date: str
    processor: str
    cores: int
    versions: dict[str, str]
    setting: Setting
    seconds: float
    """Time of all measurements (s)."""
    cell: str


class AbsoluteFigures(Record):
    """Figures of a run that only the tables of absolute figures show."""

    bits_per_byte: float
    specialisation: dict[str, float | None]
    """Normalised mutual information of a document's `cluster`, or `source`, and its main expert."""
    dead_experts: int
    worker_seconds: float
    """Metered worker-seconds over both pools."""
    sources: dict[str, float]
    """Perplexity by source."""


class RunFigures(Record):
    """Figures of one run of an arm."""

    arm: str
    budget: Budget
    perplexity: float
    """On the validation text."""
    dollars: dict[PoolName, tuple[float, ...]]
    """Planned dollars of each phase, by pool, in the phases' order."""
    hours: float | None = None
    """Planned wall-clock time (h); null if it is unknown."""
    metered: float | None = None
    """Metered dollars relative to joint training in the same comparison; null if they are unknown."""
    unseen: float | None = None
    """Perplexity on text of other sources; null if it was not measured."""
    absolute: AbsoluteFigures | None = None
    """Null for arms that the tables of absolute figures do not show."""

    @property
    def total_dollars(self) -> float:
        """Planned dollars of all phases."""
        return sum(dollars for phases in self.dollars.values() for dollars in phases)


class CellFigures(Record):
    """Figures of all runs of one (cell, seed), and how they were measured."""

    schema_version: int = SCHEMA_VERSION
    cell: str
    seed: int
    command: str
    commits: tuple[str, ...]
    """Commits that measured the runs, in order."""
    date: str
    processor: str
    cores: int
    versions: dict[str, str]
    setting: Setting
    runs: tuple[RunFigures, ...]
    """Runs, joint training first."""
