"""Settle a run before it begins: everything that its configuration leaves open is looked up or decided here, once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.starts import is_open, looked_up
from moedisco_ray.plan.build import decided, fitted
from moedisco_ray.plan.fitting import changes

_SECTIONS = {"submodels": "sub-models", "finetune": "the fine-tune's weights"}


@dataclasses.dataclass(frozen=True)
class ResolvedRun:
    """A run as it is made.

    Attributes:
        given: The configuration with commit, family and sizes of its start, with the number of clusters, and with the
            way that `recipe` means: what the run has recorded or, when it begins, the newest commit and what `auto`
            decides.
        config: The same, with the memory settings that a plan chooses where trainings do not fit their cards.
        recipe: Which way `recipe` chose, and why, when the run begins; None if nothing was chosen.
    """

    given: RunConfig
    config: RunConfig
    recipe: str | None = None

    def remarks(self) -> Iterator[str]:
        """A sentence about the way, and each training with other settings than the configuration or without bf16."""
        if self.recipe is not None:
            yield self.recipe
        for section, before, pool in self.given.trainings:
            name, after = _SECTIONS[section], getattr(self.config, section).optimizer
            old = pool.cards_without_bf16
            if old and before.precision == "auto":
                yield f"{' and '.join(old)} has no bf16, so {name} compute in fp32, several times as slowly"
            if settings := changes(before, after, f"{section}.optimizer"):
                yield f"{name} do not fit their cards as configured; the run uses {', '.join(settings)}"


def resolve(config: RunConfig) -> ResolvedRun:
    """Look up and decide what a configuration leaves open; what `check_config` has looked up is kept.

    Raises:
        ConfigError: A worker fits no node type of a mixed pool, or the tokenizer does not fit the model.
        CheckpointError: No model can be read, or no family can start from it.
        StorageError: The run is at a URI that does not respond.
    """
    known = looked_up(config, recorded=True) if is_open(config) or not config.model.known else config
    given, chosen = decided(known)
    recipe = None if chosen is None else f"recipe {known.recipe}: {chosen.name}, because {chosen.reason}"
    return ResolvedRun(given, fitted(given), recipe)
