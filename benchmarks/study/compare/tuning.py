"""Tunes every arm's learning rate, schedule and batch size by the same sweep, so that no arm has another's settings.

The sweep is a hill climb on a grid of powers of two around the configured values, with two schedules of the learning
rate. Its trainings are slices: runs of the arm on a part of the tokens. A short run prefers smaller batches than a long
one, so both the slices' choice and the configured values are then trained on all tokens, and the better one is used.
All losses are validation losses.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.study.compare.arms import Arm, arm_config
from benchmarks.study.compare.records import TunedSettings
from benchmarks.study.recipe import recipe
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.store.artifacts import read_json, write_json
from moedisco_ray.core.store.locations import Location
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.stages.corpus import input_identity

Step = tuple[int, int, int]
"""A point on the grid: exponents of two for the factors on the configured batch size and learning rate, and the
schedule: 0 as configured, 1 the other one."""

START: Step = (0, 0, 0)
MOVES: tuple[Step, ...] = ((0, 1, 0), (0, -1, 0), (0, 0, 1), (1, 0, 0), (-1, 0, 0), (1, 1, 0), (-1, -1, 0))
"""Neighbours on the grid. Batch size and rate also move together, because larger batches allow higher rates."""
MOST_TRAININGS = 16
"""Maximum trainings of one sweep: the start, its seven neighbours, and two further moves with four new neighbours
each."""

_SECTIONS = ("submodels", "finetune")
_SUBJECT = {"corpus", "tokenizer", "model"}
"""Sections of the configuration that determine a slice's loss, together with the recipe."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training of a sweep.

    Attributes:
        step: Point on the grid.
        batch_tokens: Tokens per step in the training of the whole MoE.
        lr: Learning rate in the training of the whole MoE.
        schedule: Schedule of that learning rate.
        loss: Validation loss (nats per token); None if the settings are not possible or training diverged.
    """

    step: Step
    batch_tokens: int
    lr: float
    schedule: str
    loss: float | None


@dataclasses.dataclass(frozen=True)
class Tuned:
    """Settings that a sweep chose for an arm.

    Attributes:
        arm: The arm with the chosen settings.
        settings: The chosen settings as a comparison's row shows them.
        values: The chosen settings by dotted configuration path.
    """

    arm: Arm
    settings: TunedSettings
    values: Mapping[str, Any]


def climb(measure: Callable[[Step], float | None], most: int) -> Step:
    """The point with the lowest loss that hill climbing from the configured values finds.

    Args:
        measure: Returns the loss at a point, or None if it has none.
        most: Maximum number of points to measure.
    """
    losses: dict[Step, float] = {START: _or_infinity(measure(START))}
    best = START
    while True:
        for batch, rate, schedule in MOVES:
            neighbour = (best[0] + batch, best[1] + rate, (best[2] + schedule) % 2)
            if neighbour not in losses and len(losses) < most:
                losses[neighbour] = _or_infinity(measure(neighbour))
        lowest = min(losses, key=lambda step: losses[step])  # the first of equal losses, so configured values win a tie
        if lowest == best:
            return best
        best = lowest


def tune(
    base: RunConfig, name: str, arm: Arm, output: Location, tokens: int, train: Callable[[RunConfig], float | None]
) -> Tuned:
    """Sweep an arm's learning rate and batch size, or read the result of an earlier identical sweep.

    Sweeps are stored in `base.output`/tuned, one file per text, model, recipe and length, so that later comparisons
    reuse them.

    Args:
        base: Base configuration.
        name: Name of the arm.
        arm: Arm with the settings from which the sweep starts.
        output: Directory for the slices' run directories during training.
        tokens: Tokens of each slice.
        train: Runs a slice and returns its loss; None if it diverged.

    Raises:
        ConfigError: The configuration does not allow the arm.
    """

    def trained(sweep: _Sweep, step: Step) -> float | None:
        if step not in sweep.trials:
            sweep.trials[step] = _trial(
                base, name, arm_at(sweep.start, arm, step), step, output, sweep.start.tokens.total, train
            )
            sweep.write()
        return sweep.trials[step].loss

    return _chosen(base, name, arm, output, tokens, trained)


def stored_result(base: RunConfig, name: str, arm: Arm, output: Location, tokens: int) -> Tuned | None:
    """Settings that an earlier sweep chose for an arm; None if there was no such sweep or it was interrupted.

    Raises:
        ConfigError: The configuration does not allow the arm.
    """

    def known(sweep: _Sweep, step: Step) -> float | None:
        return sweep.trials[step].loss

    try:
        return _chosen(base, name, arm, output, tokens, known)
    except KeyError:
        return None


def arm_at(start: RunConfig, arm: Arm, step: Step) -> Arm:
    """The arm at a point on the grid."""
    return dataclasses.replace(arm, settings={**arm.settings, **values_at(start, step)})


def values_at(start: RunConfig, step: Step) -> dict[str, Any]:
    """Settings by dotted path at a point on the grid.

    The batch sizes and learning rates of all trainings are multiplied alike. The schedule is that of the arm's last
    training; the trainings before it keep theirs. Instead of one cosine over the run, sub-models have a constant rate
    and the fine-tune a cosine.
    """
    batch, rate, schedule = step
    values: dict[str, Any] = {}
    for section in _SECTIONS:
        optimizer = getattr(start, section).optimizer
        values[f"{section}.optimizer.batch_tokens"] = math.floor(optimizer.batch_tokens * 2.0**batch)
        values[f"{section}.optimizer.lr"] = optimizer.lr * 2.0**rate
    last = "finetune" if start.tokens.finetune else "submodels"
    configured = getattr(start, last).optimizer.schedule
    values[f"{last}.optimizer.schedule"] = configured if not schedule else "wsd" if configured == "cosine" else "cosine"
    if schedule and configured == "run_cosine":
        values["submodels.optimizer.schedule"] = "constant"
    return values


def slice_config(base: RunConfig, name: str, arm: Arm, output: Location, tokens: int) -> RunConfig:
    """The configuration of a slice; only its final model is evaluated, on the validation documents.

    Raises:
        ConfigError: The settings do not fit together, such as a batch that is no whole number of sequences.
    """
    quiet = {"every_tokens": tokens, "stages": False, "sources": (), "lm_eval": (), "prompts": ()}
    few = base.model_copy(update={"evaluation": base.evaluation.model_copy(update=quiet)})
    return arm_config(few, name, arm, output, "tokens", tokens)


def sweep_key(start: RunConfig, arm: Arm) -> str:
    """A digest of a slice's text, model, recipe and length; its name, seed and machines do not change the digest."""
    what = {
        "text": input_identity(start),
        "recipe": recipe(start),
        "tokens": start.tokens.total,
        "measured": arm.measured,
        **start.model_dump(mode="json", include=_SUBJECT),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


class _Sweep:
    """The stored trainings of one arm at one length."""

    def __init__(self, base: RunConfig, name: str, arm: Arm, output: Location, tokens: int) -> None:
        self.start = slice_config(base, name, arm, output, tokens)
        self._store = RunStore.of(base.output)
        self.path = self._store.directory / "tuned" / f"{sweep_key(self.start, arm)}.json"
        self._store.fetch(self.path)
        self.about = {"arm": name, "tokens": tokens, "sources": [source.path for source in base.corpus.sources]}
        found: Mapping[str, Any] = read_json(self.path) if self.path.exists() else {"trainings": []}
        trials = [Trial(**(trial | {"step": tuple(trial["step"])})) for trial in found["trainings"]]
        self.trials = {trial.step: trial for trial in trials}

    def write(self) -> None:
        """Store the trainings so far."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            self.path, {**self.about, "trainings": [dataclasses.asdict(trial) for trial in self.trials.values()]}
        )
        self._store.publish(self.path)


def _chosen(
    base: RunConfig, name: str, arm: Arm, output: Location, tokens: int, loss: Callable[[_Sweep, Step], float | None]
) -> Tuned:
    slices = _Sweep(base, name, arm, output, tokens)
    best = climb(lambda step: loss(slices, step), MOST_TRAININGS)
    trained = sum(trial.loss is not None for trial in slices.trials.values())
    if best != START:
        whole = _Sweep(base, name, arm, output, base.tokens.total)
        best = min((START, best), key=lambda step: _or_infinity(loss(whole, step)))
    chosen = slices.trials[best]
    return Tuned(
        arm_at(slices.start, arm, best),
        TunedSettings(
            batch_tokens=chosen.batch_tokens,
            lr=chosen.lr,
            schedule=chosen.schedule,
            trainings=trained,
            slice_tokens=tokens,
        ),
        values_at(slices.start, best),
    )


def _trial(
    base: RunConfig,
    name: str,
    arm: Arm,
    step: Step,
    output: Location,
    tokens: int,
    train: Callable[[RunConfig], float | None],
) -> Trial:
    settings: Mapping[str, Any] = arm.settings  # `arm_at` has set plain values
    last = next(
        f"{section}.optimizer.schedule"
        for section in reversed(_SECTIONS)
        if f"{section}.optimizer.schedule" in settings
    )
    trial = Trial(
        step, settings["finetune.optimizer.batch_tokens"], settings["finetune.optimizer.lr"], settings[last], None
    )
    named = f"{name}-batch-{trial.batch_tokens}-rate-{trial.lr:.3g}-{trial.schedule}"
    try:
        config = slice_config(base, named, arm, output, tokens)
    except ConfigError:
        if step == START:
            raise
        return trial
    loss = train(config)
    return dataclasses.replace(trial, loss=loss if loss is not None and math.isfinite(loss) else None)


def _or_infinity(loss: float | None) -> float:
    return math.inf if loss is None else loss
