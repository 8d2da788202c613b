"""Reads finished runs (recipe, subject, tokens and loss) from comparisons and run directories, as points of loss curves.

Only final losses are used. An intermediate held-out loss is not the final loss of a shorter run: the learning rate has not decayed
yet, and after a seed and sub-models the fine-tune is a smaller share than the recipe's. With a constant learning rate and only the
whole model trained, it would be; but intermediate losses use a slice of the validation text, and forty of them from one run would
count as forty runs in the confidence of a prediction. Ensembles are not used either, because a run does not end with one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks.study.compare.records import ComparedRows, Row
from benchmarks.study.recipe import Subject, recipe, subject
from moedisco_ray.core.artifacts import read_json
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.renamed import stored_config, stored_settings
from moedisco_ray.core.config.wording import plain_words
from moedisco_ray.core.errors import RunDirError
from moedisco_ray.core.events import EventLog
from moedisco_ray.core.locations import Location
from moedisco_ray.core.run_store import RunStore
from moedisco_ray.plan.build import build_plan

_FIELD = "--from"
_ENDS = ("run_started", "run_finished", "run_failed", "run_stopped")


class MeasuredRun(BaseModel):
    """One finished run."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    title: str
    """Title for people."""
    recipe: dict[str, Any]
    """Settings that the run was trained with; see `recipe.recipe`."""
    subject: Subject
    """Model and text of the run."""
    tokens: int = Field(gt=0)
    """Planned training tokens, summed over all models of the run."""
    submodel_steps: int | None
    """Steps of one sub-model; null without sub-models."""
    loss: float = Field(gt=0, allow_inf_nan=False)
    """Loss of the final model on the validation documents (nats per token)."""
    seed: int
    reading_share: float = Field(0.0, ge=0)
    """Dollars for reading outside training, relative to the training dollars, at the prices of the measurement. 0 for run
    directories, where it is not counted."""
    reference: bool = False
    """Whether this run is the reference: joint training on the high-memory pool."""

    @property
    def sync_every(self) -> int | None:
        """Steps between two sync rounds; None without rounds."""
        return self.recipe.get("submodels.sync_every")

    @property
    def rounds(self) -> int | None:
        """Number of sync rounds in a sub-model's training; None without rounds."""
        if self.sync_every is None or self.submodel_steps is None:
            return None
        return -(-self.submodel_steps // self.sync_every)

    @property
    def identity(self) -> str:
        """Key that is equal for copies of one run, whatever their titles."""
        return json.dumps(self.model_dump(exclude={"title", "reference", "reading_share"}), sort_keys=True)


@dataclasses.dataclass(frozen=True)
class Measurements:
    """Measured runs, and what was left out.

    Attributes:
        runs: Finished runs, each once, in an order that does not depend on the paths.
        set_aside: For each run that was left out, a line with the reason.
    """

    runs: tuple[MeasuredRun, ...]
    set_aside: tuple[str, ...] = ()


def read_measurements(paths: Sequence[Location]) -> Measurements:
    """Read the finished runs of comparisons and run directories.

    Args:
        paths: Each a `compare.json` or another JSON file with such `rows`, a folder of such files, or a run directory; or the URI
            of a run or of a comparison.

    Raises:
        RunDirError: A path is none of these, or no path has a finished run.
    """
    runs: list[MeasuredRun] = []
    set_aside: list[str] = []
    for path in paths:
        if (store := RunStore.of(path)).read("config.json") is not None:
            found, unfit = _of_run(store)
        else:
            tables = [table for file in _json_files(path) if (table := _comparison(file)) is not None]
            if not tables:
                remedy = "holds no comparison (`python -m benchmarks.study compare` writes one) and no run"
                raise RunDirError(_FIELD, str(path), remedy)
            found, unfit = _of_comparisons(tables)
        runs += found
        set_aside += unfit
    if not runs:
        reason = set_aside[0] if set_aside else "nothing was named"
        raise RunDirError(_FIELD, None, f"no finished run to advise from ({reason}); finish one, or name others")
    unique = {run.identity: run for run in sorted(runs, key=lambda run: (run.reference, run.reading_share, run.title))}
    return Measurements(tuple(unique[identity] for identity in sorted(unique)), tuple(sorted(set(set_aside))))


def comparison_runs(table: ComparedRows) -> list[MeasuredRun]:
    """The runs of a comparison whose measured loss is that of their final model."""
    return [
        MeasuredRun(
            title=row.title, recipe=stored_settings(row.recipe), subject=row.subject, tokens=row.tokens,
            submodel_steps=_submodel_steps(row), loss=row.loss, seed=table.seed, reading_share=_reading_share(row),
            reference=row.recipe == table.rows[0].recipe)
        for row in table.rows if row.measured == "finetune"]


def _of_comparisons(tables: Iterable[ComparedRows]) -> tuple[list[MeasuredRun], list[str]]:
    runs, set_aside = [], []
    for table in tables:
        found = comparison_runs(table)
        runs += found
        if len(found) < len(table.rows):
            set_aside.append("ensembles: they are no model that a run ends with")
    return runs, set_aside


def _of_run(store: RunStore) -> tuple[list[MeasuredRun], list[str]]:
    if not _is_finished(store):
        return [], [f"{store.location}: not finished"]
    try:
        config = stored_config(json.loads(store.read("config.json") or b""))
        loss = json.loads(store.read("evaluation/evaluation.json") or b"")["loss"]
        return [run_of(config, loss)], []
    except (OSError, ValueError, KeyError) as error:    # UserError and the errors of pydantic and json are ValueErrors
        raise RunDirError(_FIELD, str(store.location), f"cannot be read ({' '.join(str(error).split())[:200]})") from error


def run_of(config: RunConfig, loss: float) -> MeasuredRun:
    """A finished run, from its configuration and the loss of its final model.

    Raises:
        UserError: The run's model or tokenizer can no longer be read.
    """
    plan, tokens = build_plan(config), config.tokens
    steps = {stage.stage: stage.steps for stage in plan.stages}
    return MeasuredRun(
        title=config.name, recipe=recipe(config), subject=subject(config, plan), tokens=plan.tokens, loss=loss, seed=config.seed,
        submodel_steps=steps.get("submodels"),
        reference=not tokens.decoupled and not tokens.seed_share and config.finetune.pool == "high_memory")


def _is_finished(store: RunStore) -> bool:
    ends = [event.type for event in EventLog.parse(store.read("events.jsonl") or b"") if event.type in _ENDS]
    return bool(ends) and ends[-1] == "run_finished"


def _json_files(place: Location) -> list[Path]:
    store = RunStore.of(place)
    store.fetch(store.directory / "compare.json")
    path = store.directory
    if path.is_file():
        return [path]
    own = path / "compare.json"
    return [own] if own.is_file() else sorted(path.glob("*.json"))


def _comparison(file: Path) -> ComparedRows | None:
    try:
        content = read_json(file)
        return ComparedRows.model_validate(content) if isinstance(content, dict) and content.get("rows") else None
    except ValidationError as error:
        first = error.errors()[0]
        remedy = f"{'.'.join(map(str, first['loc']))} {plain_words(first)}; repeat the comparison, or leave the file out"
        raise RunDirError(_FIELD, str(file), remedy) from error
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunDirError(_FIELD, str(file), f"cannot be read ({error})") from error


def _submodel_steps(row: Row) -> int | None:
    return next((phase.steps for phase in row.phases if phase.stage == "submodels"), None)


def _reading_share(row: Row) -> float:
    trained = sum(phase.dollars for phase in row.phases if phase.steps is not None)
    read = sum(phase.dollars for phase in row.phases if phase.steps is None)
    return read / trained if trained else 0.0
