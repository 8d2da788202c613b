"""What a plan knows of a stage: its time and dollars, its files, and the memory of its workers.

Each stage has a page in `plan.stages`, and `core.stages` names it. What trains is planned by `plan.stage_plan`, in the
same way for all stages; the pages say which trainings there are, and what a stage costs that trains nothing.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Callable, Iterable

from moedisco_ray.core.config import AnyPool, RunConfig
from moedisco_ray.core.stages import Stage
from moedisco_ray.plan.files import Files, StageStorage
from moedisco_ray.plan.memory import Memory
from moedisco_ray.plan.reading import Reading, StageEstimate
from moedisco_ray.plan.stage_memory import Streams
from moedisco_ray.plan.stage_training import StageTraining


@dataclasses.dataclass(frozen=True)
class Work:
    """Work of a stage that runs text through a model without training it.

    Attributes:
        stage: The stage.
        pool: Pool of the worker.
        setting: Setting with the number of tokens.
        tokens: Number of tokens.
        measure: Memory that a number of tokens takes.
        remedy: Setting that avoids the work; by default, fewer tokens make it fit.
    """

    stage: str
    pool: AnyPool
    setting: str
    tokens: int
    measure: Callable[[int], Memory]
    remedy: str | None = None


def _no_works(_streams: Streams) -> Iterable[Work]:
    return ()


@dataclasses.dataclass(frozen=True)
class StageCost:
    """What a stage costs.

    Attributes:
        estimate: Time and dollars of the stage if it trains nothing.
        storage: Bytes that the stage stores and moves if it trains nothing; None if it has no large files.
        works: Its work that runs text through a model without training it.
        training: Its training, whose tokens may be 0; None if the stage never trains.
    """

    estimate: Callable[[Reading], StageEstimate]
    storage: Callable[[Files], StageStorage | None]
    works: Callable[[Streams], Iterable[Work]] = _no_works
    training: Callable[[RunConfig, int], StageTraining] | None = None


def _no_files(_files: Files) -> None:
    """A training without tokens takes over its input."""


def cost_of_training(
    stage: str,
    training: Callable[[RunConfig, int], StageTraining],
    untrained: Callable[[Files], StageStorage | None] = _no_files,
) -> StageCost:
    """What a stage costs that trains; without tokens it takes no time.

    Args:
        stage: Name of the stage.
        training: Its training, from the configuration and the entries of the vocabulary.
        untrained: Bytes that the stage stores and moves if it has no tokens.
    """
    return StageCost(lambda reading: reading.on_head(stage, 0.0), untrained, training=training)


def cost_of(stage: Stage) -> StageCost:
    """What a stage costs.

    Raises:
        LookupError: Nothing says what the stage costs; 0 dollars would be a wrong guess.
    """
    try:
        found: StageCost = pkgutil.resolve_name(stage.cost)
    except (ImportError, AttributeError, ValueError) as error:
        raise LookupError(f"nothing is planned for stage {stage.name}: {stage.cost!r} is missing") from error
    return found
