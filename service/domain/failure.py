"""Where a run failed, and which change of its settings may help."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from moedisco_ray.core.errors import DivergedError, NotFiniteError
from moedisco_ray.core.stages import TRAINING

_DIVERGED = frozenset({DivergedError.__name__, NotFiniteError.__name__})
_RECIPES = {stage.name: stage.recipe for stage in TRAINING}
_SLOWER = 0.5
"""Proposed learning rate of a training that diverged, relative to its own."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """Where a run failed.

    Attributes:
        stage: Stage that failed; None if none had begun.
        unit: Training that the message names; None if it names none.
        setting: Setting that the message is about, as a dotted path; None if it is about none.
        changes: Values that may help, by dotted path; empty if nothing is known to.
        meaning: What the changes do, in words; empty without changes.
    """

    stage: str | None
    unit: str | None
    setting: str | None
    changes: dict[str, float]
    meaning: str


def failure_of(progress: Mapping[str, Any], units: Collection[str], config: Mapping[str, Any]) -> Failure:
    """Where a failed run failed.

    Args:
        progress: The run's `progress`, with its driver's final event.
        units: Names of the run's trainings.
        config: The run's configuration.
    """
    ended = progress.get("ended") or {}
    stages: Mapping[str, Mapping[str, Any]] = progress.get("stages") or {}
    stage = next((name for name, each in stages.items() if each.get("status") == "failed"), None)
    message = str(ended.get("message") or "")
    named = [unit for unit in units if message.startswith(f"{unit}:") or f" {unit}:" in message]
    unit = max(named, key=len, default=None)
    field = ended.get("field")
    setting = field if isinstance(field, str) and _is_setting(config, field) else None
    lr = f"{_RECIPES[stage]}.optimizer.lr" if stage in _RECIPES and ended.get("error") in _DIVERGED else None
    value = None if lr is None else _at(config, lr)
    if lr is None or isinstance(value, bool) or not isinstance(value, float | int):
        return Failure(stage, unit, setting, changes={}, meaning="")
    return Failure(stage, unit, setting or lr, changes={lr: _SLOWER * value}, meaning="half the learning rate")


def _is_setting(config: Mapping[str, Any], path: str) -> bool:
    section, _, _ = path.partition(".")
    return section in config


def _at(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
