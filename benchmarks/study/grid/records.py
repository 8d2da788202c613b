"""Results of the grid as typed records: tuned settings, measured pieces, and the entries of the summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.study.compare.records import TunedSettings
from benchmarks.study.grid.cells import Cell, ScaleName, Start
from moedisco_ray.core.config import FamilyName, PoolName
from moedisco_ray.core.config.renamed import stored_settings
from moedisco_ray.core.records.summaries import Record


class Made(Record):
    """How a result was made."""

    command: str
    commit: str
    date: str
    processor: str
    cores: int
    versions: dict[str, str]
    seconds: float
    """Wall-clock time of the piece (s); for a piece that was killed and continued, of the last attempt."""


class TunedArm(Record):
    """Settings that a sweep chose for an arm in a tuning cell."""

    cell: Cell
    seed: int
    arm: str
    values: dict[str, Any]
    """The chosen settings by dotted configuration path."""
    recipe: dict[str, Any]
    """The arm's other settings, by dotted path: with different ones, the sweep says nothing."""
    settings: TunedSettings
    made: Made

    def applies_to(self, recipe: Mapping[str, Any]) -> bool:
        """Whether the arm still is what was swept: it has the same settings, but for the chosen ones."""
        own, other = stored_settings(self.recipe), stored_settings(recipe)
        return all(other.get(path, value) == value for path, value in own.items())

    def chose(self, recipe: Mapping[str, Any]) -> bool:
        """Whether a run with this recipe has the chosen values, but for those that have no effect in it."""
        return self.applies_to(recipe) and all(recipe.get(path, value) == value for path, value in self.values.items())


class Phase(Record):
    """One phase of a run."""

    pool: PoolName
    flops: float
    """Operations (FLOPs)."""
    workers: float
    """Number of workers that share the phase at the same time; in the mean, if the last ones have less to do."""


class PieceResult(Record):
    """What one arm reached in one cell with one seed."""

    cell: Cell
    arm: str
    seed: int
    loss: float
    """Loss on the validation documents (nats per token)."""
    bits_per_byte: float | None
    unseen_perplexity: float | None
    """Perplexity on text of other corpora; null without such text."""
    phases: tuple[Phase, ...]
    recipe: dict[str, Any]
    """Settings that the run was trained with, by dotted path, as they were recorded; see `settings`."""
    tuned: TunedSettings | None
    """Settings that a sweep chose in the tuning cell; null if the arm ran at the grid's starting values."""
    made: Made

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe under today's names, without settings that were removed.

        The record keeps those: the constants that replaced them may have other values (`section.earlier_clustering`).
        """
        return stored_settings(self.recipe)


class Spread(Record):
    """Smallest and largest value over the seeds."""

    min: float
    max: float


class Dollars(Record):
    """Dollars relative to joint training's, by price book; null if they are unknown."""

    paper: float | None
    marketplace: float | None
    aws: float | None


class Entry(Record):
    """An entry of summary.json: figures of one arm in one cell, over the seeds."""

    corpus: str
    family: FamilyName
    start: Start
    experts: int
    top_k: int
    active_share: float
    budget_tokens: int
    arm: str
    seeds: tuple[int, ...]
    loss_gap: float
    """Loss at equal tokens minus joint training's with the same seed (nats per token), median over the seeds."""
    loss_gap_spread: Spread
    dollars_to_joint_loss: Dollars
    """Dollars until the arm reaches joint training's loss; null if joint training was measured at one budget only and
    there is a gap."""
    hours_ratio: float
    """Hours for the same tokens, relative to joint training on one large card, with one cheap card per sub-model."""


class Figures(Entry):
    """An entry with the further figures that tables show."""

    loss: float
    """Loss on the validation documents (nats per token), median over the seeds."""
    scale: ScaleName
    bits_per_byte: float | None
    """The same in bits per byte of text; null if a piece has none."""
    unseen: float | None
    """Perplexity on text of other corpora relative to joint training's, median over the seeds; null if a piece has
    none."""
    gaps: dict[int, float]
    """Loss at equal tokens minus joint training's (nats per token), by seed."""
    dollars_equal_tokens: Dollars
    """Dollars for the same tokens."""
    tuned: bool
    """Whether a sweep in the tuning cell chose the settings of this arm and of joint training."""
