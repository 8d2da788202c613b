"""Finished runs as points of a curve: recipe, subject, tokens and loss, from comparisons and from run directories.

Only ends count. A look at the held-out loss while a model is trained is not what a shorter run would have ended at: its learning
rate has not come down yet, and where a seed and sub-models came before, its fine-tune is a smaller share than the recipe's. Where
the learning rate is constant and the whole model is all that is trained, it would be; but a look is taken on a slice of the
validation text, and forty looks at one run are not forty runs, which is what they would be counted as when it is asked how sure a
prediction is. Nor does an ensemble count, which is no model that a run ends with.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from benchmarks.study.recipe import recipe, subject
from moedisco_ray.core.artifacts import read_json
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.renamed import stored_config, stored_settings
from moedisco_ray.core.config.wording import plain_words
from moedisco_ray.core.errors import RunDirError
from moedisco_ray.core.events import EventLog
from moedisco_ray.plan.build import build_plan

_FIELD = "--from"
_ENDS = ("run_started", "run_finished", "run_failed", "run_stopped")


class MeasuredRun(BaseModel):
    """One finished run."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    title: str
    """For people."""
    recipe: dict[str, Any]
    """What it was trained by; see `recipe.recipe`."""
    subject: dict[str, Any]
    """What was trained; see `recipe.subject`."""
    tokens: int = Field(gt=0)
    """Planned, of all its models together."""
    submodel_steps: int | None
    """Of one sub-model; null where there are none."""
    loss: float = Field(gt=0, allow_inf_nan=False)
    """Of its final model on the validation documents, nats per token."""
    seed: int
    beside: float = Field(0.0, ge=0)
    """Dollars of what it read outside its training, at the prices it was measured with, as a share of its training's. 0 where that
    was not counted: of a run directory, and in comparisons of earlier versions."""
    reference: bool = False
    """Whether it is what the others are compared with: joint training on the high-memory pool."""

    @property
    def sync_every(self) -> int | None:
        """Steps between two rounds; None where there are none."""
        return self.recipe.get("submodels.sync_every")

    @property
    def rounds(self) -> int | None:
        """Parts that rounds cut a sub-model's training into; None where there are none."""
        if self.sync_every is None or self.submodel_steps is None:
            return None
        return -(-self.submodel_steps // self.sync_every)

    @property
    def identity(self) -> str:
        """The same for a run that was found twice, whatever it was called there."""
        return json.dumps(self.model_dump(exclude={"title", "reference", "beside"}), sort_keys=True)


@dataclasses.dataclass(frozen=True)
class Measurements:
    """What was found.

    Attributes:
        runs: In an order that does not depend on where they were found, each once.
        set_aside: What does not count, and why: a line each.
    """

    runs: tuple[MeasuredRun, ...]
    set_aside: tuple[str, ...] = ()


def read_measurements(paths: Sequence[Path]) -> Measurements:
    """The finished runs of comparisons and run directories.

    Args:
        paths: `compare.json` or any JSON file with such `rows`; a folder of such files; a run directory.

    Raises:
        RunDirError: A path holds nothing of the kind, or there is no finished run in any.
    """
    runs: list[MeasuredRun] = []
    set_aside: list[str] = []
    for path in paths:
        if (path / "config.json").is_file():
            found, unfit = _of_directory(path)
        else:
            tables = [(file, table) for file in _json_files(path) if (table := _comparison(file)) is not None]
            if not tables:
                remedy = "holds no comparison (`python -m benchmarks.study compare` writes one) and no run"
                raise RunDirError(_FIELD, str(path), remedy)
            found, unfit = _of_comparisons(tables)
        runs += found
        set_aside += unfit
    if not runs:
        reason = set_aside[0] if set_aside else "nothing was named"
        raise RunDirError(_FIELD, None, f"no finished run to advise from ({reason}); finish one, or name others")
    unique = {run.identity: run for run in sorted(runs, key=lambda run: (run.reference, run.beside, run.title))}
    return Measurements(tuple(unique[identity] for identity in sorted(unique)), tuple(sorted(set(set_aside))))


def comparison_runs(table: Mapping[str, Any], source: str) -> list[MeasuredRun]:
    """The runs of a comparison whose loss is of the model that they end with.

    Args:
        table: `rows`, with the reference first; `seed`.
        source: Named in errors.

    Raises:
        RunDirError: A row lacks what is asked of it.
    """
    reference = table["rows"][0].get("recipe")
    try:
        return [
            MeasuredRun.model_validate({
                **row, "recipe": stored_settings(row["recipe"]), "seed": table.get("seed", 0),
                "submodel_steps": _submodel_steps(row), "beside": _beside(row), "reference": row["recipe"] == reference})
            for row in table["rows"] if row["measured"] == "finetune"]
    except KeyError as error:
        raise RunDirError(
            _FIELD, source,
            f"a row has no {error}, for an earlier version wrote it; the same comparison again adds it at no cost") from error
    except ValidationError as error:
        first = error.errors()[0]
        remedy = f"{'.'.join(map(str, first['loc']))} of a row {plain_words(first)}; leave it out"
        raise RunDirError(_FIELD, source, remedy) from error


def _of_comparisons(tables: Iterable[tuple[Path, dict[str, Any]]]) -> tuple[list[MeasuredRun], list[str]]:
    runs, set_aside = [], []
    for file, table in tables:
        found = comparison_runs(table, str(file))
        runs += found
        if len(found) < len(table["rows"]):
            set_aside.append("ensembles: they are no model that a run ends with")
    return runs, set_aside


def _of_directory(directory: Path) -> tuple[list[MeasuredRun], list[str]]:
    if not _is_finished(directory):
        return [], [f"{directory}: not finished"]
    try:
        config = stored_config(read_json(directory / "config.json"))
        loss = read_json(directory / "evaluation" / "evaluation.json")["loss"]
        return [run_of(config, loss)], []
    except (OSError, ValueError, KeyError) as error:    # UserError and pydantic's and json's are values' errors
        raise RunDirError(_FIELD, str(directory), f"cannot be read ({' '.join(str(error).split())[:200]})") from error


def run_of(config: RunConfig, loss: float) -> MeasuredRun:
    """A finished run, from its configuration and the loss of its final model.

    Raises:
        UserError: Its model or tokeniser is not to be read any more.
    """
    plan, tokens = build_plan(config), config.tokens
    steps = {stage.stage: stage.steps for stage in plan.stages}
    return MeasuredRun(
        title=config.name, recipe=recipe(config), subject=subject(config, plan), tokens=plan.tokens, loss=loss, seed=config.seed,
        submodel_steps=steps.get("submodels"),
        reference=not tokens.decoupled and not tokens.seed_share and config.finetune.pool == "high_memory")


def _is_finished(directory: Path) -> bool:
    ends = [event.type for event in EventLog.read(directory / "events.jsonl") if event.type in _ENDS]
    return bool(ends) and ends[-1] == "run_finished"


def _json_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    own = path / "compare.json"
    return [own] if own.is_file() else sorted(path.glob("*.json"))


def _comparison(file: Path) -> dict[str, Any] | None:
    try:
        table = read_json(file)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunDirError(_FIELD, str(file), f"cannot be read ({error})") from error
    return table if isinstance(table, dict) and table.get("rows") else None


def _submodel_steps(row: Mapping[str, Any]) -> int | None:
    steps = {phase["stage"]: phase["steps"] for phase in row["phases"]}
    return steps.get("submodels")


def _beside(row: Mapping[str, Any]) -> float:
    trained = sum(phase["dollars"] for phase in row["phases"] if phase["steps"] is not None)
    read = sum(phase["dollars"] for phase in row["phases"] if phase["steps"] is None)
    return read / trained if trained else 0.0
