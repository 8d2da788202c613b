"""Settle a run before it begins: everything that its configuration leaves open is looked up or decided here, once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.starts import settled
from moedisco_ray.plan.build import fitted
from moedisco_ray.plan.cluster_count import with_cluster_count
from moedisco_ray.plan.fitting import changes

_SECTIONS = {"submodels": "sub-models", "finetune": "the fine-tune's weights"}


@dataclasses.dataclass(frozen=True)
class ResolvedRun:
    """A run as it is made.

    Attributes:
        given: The configuration with the commit of a start at the hub, its family, and the number of clusters: those
            that the run has recorded or, when it begins, the newest commit and the number that `auto` decides.
        config: The same, with the memory settings that a plan chooses where trainings do not fit their cards.
    """

    given: RunConfig
    config: RunConfig

    def remarks(self) -> Iterator[str]:
        """A sentence about each training with other settings than the configuration, or in fp32 for want of bf16."""
        pools = {"submodels": self.given.pools.low_memory, "finetune": self.given.finetune_pool}
        for section, name in _SECTIONS.items():
            old = pools[section].cards_without_bf16
            if old and getattr(self.given, section).optimizer.precision == "auto":
                yield f"{' and '.join(old)} has no bf16, so {name} compute in fp32, several times as slowly"
            before, after = getattr(self.given, section).optimizer, getattr(self.config, section).optimizer
            if settings := changes(before, after, f"{section}.optimizer"):
                yield f"{name} do not fit their cards as configured; the run uses {', '.join(settings)}"


def resolve(config: RunConfig) -> ResolvedRun:
    """Settle a checked configuration.

    Raises:
        ConfigError: A worker fits no node type of a mixed pool, or the tokenizer does not fit the model.
        CheckpointError: No model can be read, or no family can start from it.
        StorageError: The run is at a URI that does not respond.
    """
    given = with_cluster_count(settled(config))
    return ResolvedRun(given, fitted(given))
