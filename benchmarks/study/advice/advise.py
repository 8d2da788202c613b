"""What measured runs advise for a budget, or for a loss to reach, and how sure that is.

Tokens are what carries over from a measurement, and what they cost is the configuration's own: a recipe's loss is a curve over its
tokens, and the prices, pools and model of the configuration that is advised turn them into dollars. Where the very same model was
measured on the same text, its losses are predicted (`prediction`). Where another one of its family was, they are not: what is taken
over is how many tokens a recipe needs for the loss that joint training reached, as a multiple of joint training's (`transfer`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.study.advice.advised import Advice, Goal
from benchmarks.study.advice.measured import MeasuredRun, Measurements
from benchmarks.study.advice.prediction import predict
from benchmarks.study.advice.transfer import transfer
from benchmarks.study.recipe import subject
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.plan.build import build_plan


def advise(config: RunConfig, measurements: Measurements, goal: Goal) -> Advice:
    """The recipe to train the configuration's model by.

    Args:
        config: Names the model, the text, the pools and their prices.
        measurements: Finished runs, of this model and text or of others of the family.
        goal: What is given: dollars to spend, or a loss to reach for the least of them.

    Raises:
        ConfigError: The goal cannot be answered from these runs.
        RunDirError: The runs do not show how a loss falls, or what joint training reaches.
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
        differing = sorted({path for run in kin for path in own if run.subject.get(path) != own[path]})
        raise ConfigError(
            goal.flag, goal.value,
            f"these runs are of other models or texts ({', '.join(differing)} differ), whose losses do not carry over; "
            "give --budget-dollars, or measure this configuration")
    return transfer(config, own, kin, goal, measurements.set_aside)


def _kin(own: dict[str, Any], runs: Sequence[MeasuredRun]) -> list[MeasuredRun]:
    """Runs of the family, and from as random or as trained a start."""
    of_family = [run for run in runs if run.subject["family"] == own["family"]]
    if not of_family:
        families = ", ".join(sorted({run.subject["family"] for run in runs}))
        raise ConfigError(
            "model.family", own["family"],
            f"these runs are of {families}, and nothing carries over between families; "
            "run `python -m benchmarks.study compare` on a small one of it")
    kin = [run for run in of_family if (run.subject["start"] == "random") == (own["start"] == "random")]
    if not kin:
        measured = "a checkpoint" if own["start"] == "random" else "random weights"
        raise ConfigError(
            "model.init", own["start"],
            f"these runs start from {measured}, which decides what a recipe is worth; "
            "run `python -m benchmarks.study compare` from such a start")
    return kin
