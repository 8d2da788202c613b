"""Chooses a recipe for a budget or a target loss from measured runs, and rates how certain the choice is.

A measurement gives a recipe's loss as a curve over its tokens. The prices, pools and model of the given configuration turn tokens
into dollars. If the same model was measured on the same text, its losses are predicted (`prediction`). If only other models of its
family were measured, losses are not predicted; instead, the number of tokens that a recipe needs to reach joint training's loss,
relative to joint training, is assumed to be the same (`transfer`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.study.advice.advised import Advice, Goal
from benchmarks.study.advice.measured import MeasuredRun, Measurements
from benchmarks.study.advice.prediction import predict
from benchmarks.study.advice.transfer import transfer
from benchmarks.study.recipe import Subject, subject
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.plan.build import build_plan


def advise(config: RunConfig, measurements: Measurements, goal: Goal) -> Advice:
    """Recommend a recipe for the configuration's model.

    Args:
        config: Configuration with the model, the text, the pools and their prices.
        measurements: Finished runs with this model and text, or with other models or texts of the family.
        goal: Dollars to spend, or a loss to reach at minimum cost.

    Raises:
        ConfigError: These runs allow no recommendation for the goal.
        RunDirError: The runs do not show how the loss falls with tokens, or which loss joint training reaches.
    """
    if not 0 < goal.value < math.inf:
        raise ConfigError(goal.flag, goal.value, "must be a number above 0")
    own = subject(config, build_plan(config))
    same = [run for run in measurements.runs if run.subject == own]
    if same:
        others = len(measurements.runs) - len(same)
        left_out = (f"{others} runs of other models or texts",) if others else ()
        return predict(config, same, goal, (*measurements.set_aside, *left_out))
    kin = _kin(own, measurements.runs)
    if goal.kind == "target_loss":
        differing = sorted({
            name for run in kin for name in Subject.model_fields if getattr(run.subject, name) != getattr(own, name)})
        raise ConfigError(
            goal.flag, goal.value,
            f"these runs are of other models or texts ({', '.join(differing)} differ), whose losses do not carry over; "
            "give --budget-dollars, or measure this configuration")
    return transfer(config, own, kin, goal, measurements.set_aside)


def _kin(own: Subject, runs: Sequence[MeasuredRun]) -> list[MeasuredRun]:
    """Runs of the same model family and the same kind of start (random or trained)."""
    of_family = [run for run in runs if run.subject.family == own.family]
    if not of_family:
        families = ", ".join(sorted({run.subject.family for run in runs}))
        raise ConfigError(
            "model.family", own.family,
            f"these runs are of {families}, and nothing carries over between families; "
            "run `python -m benchmarks.study compare` on a small one of it")
    kin = [run for run in of_family if (run.subject.start == "random") == (own.start == "random")]
    if not kin:
        measured = "a checkpoint" if own.start == "random" else "random weights"
        raise ConfigError(
            "model.init", own.start,
            f"these runs start from {measured}, which decides what a recipe is worth; "
            "run `python -m benchmarks.study compare` from such a start")
    return kin
