"""Runs the arms one after the other, each as a product run in its own directory, all on the same corpus and tokenizer."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.study.compare.accounting import (
    Point,
    Reads,
    account,
    curve,
    dollars_of,
    first_reach,
    hours_of,
    metered_dollars,
    trained_tokens,
    wall_hours,
)
from benchmarks.study.compare.arms import ARMS, REFERENCE, Arm, Budget, arm_config, chosen, predicted, run_name, tokens_for
from benchmarks.study.compare.quality import note_quality
from benchmarks.study.compare.reading import expected, found
from benchmarks.study.compare.tuning import Tuned, kept, tune
from benchmarks.study.recipe import recipe, subject
from moedisco_ray.backend import Backend
from moedisco_ray.cli.display import View
from moedisco_ray.core import stages
from moedisco_ray.core.artifacts import is_done, read_json, write_json
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import ConfigError, DivergedError
from moedisco_ray.core.events import EventLog
from moedisco_ray.core.metering import Meter
from moedisco_ray.execution import pipeline
from moedisco_ray.plan import build_plan
from moedisco_ray.stages.corpus import input_identity

BUDGETS: tuple[Budget, ...] = ("tokens", "dollars")
"""Budgets for which arms are trained by default."""
_EVERY_BUDGET: tuple[Budget, ...] = (*BUDGETS, "loss")


def compare(
    base: RunConfig, output: Path, names: Sequence[str] = (), *, budgets: Sequence[Budget] = BUDGETS,
    view: Callable[[], View] | None = None, backend: Backend | None = None, known: Mapping[str, Arm] = ARMS, slice_tokens: int = 0,
) -> dict[str, Any]:
    """Train every arm, once at joint training's tokens and once at its planned dollars, and compare the results.

    If requested, also train each arm to joint training's loss, provided that its other two runs allow a prediction of the length.

    Dollars include everything in the account (`accounting`), not only training.

    Finished runs are not repeated: an interrupted comparison resumes, and arms that an earlier comparison in the
    same directory finished stay in the table.

    Args:
        base: Base configuration; its tokens are those of joint training.
        output: Directory for the arms' run directories and `compare.json`.
        names: Names of the arms to train; empty for all. The reference is always included.
        budgets: Quantities that are made equal to joint training's, `loss` last.
        view: Creates the view of a run, which is closed when the run ends; None shows nothing.
        backend: Backend that runs the work; None uses Ray.
        known: Arms to choose from.
        slice_tokens: Tokens of each short training that tunes an arm's learning rate and batch size (`tuning`); 0 trains with the
            configured values.

    Returns:
        Content of `compare.json`: `reference`, `name`, `seed`, `target_loss` (joint training's last held-out loss) and `rows`, one
        per run; see `measured`. A row's `tuned` has the settings that its sweep chose; None without a sweep.

    Raises:
        ConfigError: There is no such arm, or the configuration does not allow it.
        RunError: A run failed; the same call resumes.
    """
    asked = chosen(names, known)
    corpus = output / run_name(REFERENCE, "tokens") / "corpus"

    def reads(config: RunConfig, arm: Arm) -> Reads:
        return expected(config, arm.measured, corpus)    # the reference runs first, so its corpus exists

    tuned = _tune(base, asked, output, slice_tokens, view, backend) | _kept(base, known, asked, output, slice_tokens)
    known = {**known, **{name: found.arm for name, found in tuned.items()}}

    def dear(arm: Arm, budget: Literal["tokens", "dollars"]) -> int:
        return tokens_for(base, arm, budget, reads, known[REFERENCE])

    rows: list[dict[str, Any]] = []
    finished: list[Path] = []
    for (name, arm), budget in itertools.product(known.items(), _EVERY_BUDGET):
        wanted = name in asked and budget in (BUDGETS[:1] if name == REFERENCE else budgets)
        if not wanted and not (output / run_name(name, budget)).exists():
            continue
        try:
            config = _config(base, (name, arm), budget, output, dear, rows)
        except ConfigError:
            if wanted:
                raise
            continue
        if config is None or not (wanted or pipeline.is_finished(config)):
            continue
        if wanted:
            _run(config, finished, view, backend)
        finished.append(config.directory)
        rows.append({**measured(name, arm, budget, config), "tuned": tuned[name].row() if name in tuned else None})
    target = add_target(rows)
    result = {"reference": REFERENCE, "name": base.name, "seed": base.seed, "target_loss": target, "rows": rows}
    write_json(output / "compare.json", result)
    note_quality(output, rows)
    return result


def _config(
    base: RunConfig, named: tuple[str, Arm], budget: Budget, output: Path,
    dear: Callable[[Arm, Literal["tokens", "dollars"]], int], rows: Sequence[Mapping[str, Any]],
) -> RunConfig | None:
    """Configuration of an arm's run; None if its earlier runs do not predict the tokens to reach joint training's loss."""
    name, arm = named
    if budget == "loss":
        tokens = predicted([(row["tokens"], row["loss"]) for row in rows if row["arm"] == name], rows[0]["loss"])
    else:
        tokens = dear(arm, budget)
    return None if tokens is None else arm_config(base, name, arm, output, budget, tokens)


def _tune(
    base: RunConfig, asked: Mapping[str, Arm], output: Path, slice_tokens: int, view: Callable[[], View] | None,
    backend: Backend | None,
) -> dict[str, Tuned]:
    """Tune every arm of a comparison; a slice's run directory is removed once the next slice has linked its corpus."""
    slices = output / "slices"
    finished: list[Path] = []

    def train(config: RunConfig) -> float | None:
        try:
            _run(config, finished, view, backend)
        except DivergedError:
            return None
        evaluation = read_json(config.directory / "evaluation" / "evaluation.json")
        loss: float = (evaluation["ensemble"] if config.evaluation.ensemble else evaluation)["loss"]
        for before in finished:
            shutil.rmtree(before)
        finished[:] = [config.directory]
        return loss

    tuned = {name: tune(base, name, arm, slices, slice_tokens, train) for name, arm in asked.items()} if slice_tokens else {}
    shutil.rmtree(slices, ignore_errors=True)
    return tuned


def _kept(
    base: RunConfig, known: Mapping[str, Arm], asked: Mapping[str, Arm], output: Path, slice_tokens: int,
) -> dict[str, Tuned]:
    """Results of earlier sweeps for arms that this comparison does not train but may have finished runs of."""
    found: dict[str, Tuned] = {}
    for name, arm in known.items() if slice_tokens else ():
        if name not in asked:
            with contextlib.suppress(ConfigError):
                tuned = kept(base, name, arm, output / "slices", slice_tokens)
                found |= {} if tuned is None else {name: tuned}
    return found


def _run(config: RunConfig, others: Sequence[Path], view: Callable[[], View] | None, backend: Backend | None) -> None:
    share_corpus(config, others)
    with contextlib.ExitStack() as stack:
        views = () if view is None else (stack.enter_context(contextlib.closing(view())),)
        pipeline.run(config, views, backend=backend)


def measured(name: str, arm: Arm, budget: Budget, config: RunConfig) -> dict[str, Any]:
    """Quality and cost of an arm's finished run.

    Returns:
        `arm`, `title`, `budget` and `run` (name of the run directory); `recipe` and `subject` (see `recipe`); `measured`, the model
        that is the arm's result; `tokens`, the training tokens; `flops`, `dollars` and `hours`, planned totals, and the same by
        phase in `phases` (`accounting.PhaseCost`); `metered_dollars`, and `worker_seconds` by pool; `loss`, `perplexity` and
        `bits_per_byte` on the validation documents; `sources`, the perplexity by source; `specialisation`, the normalised mutual
        information of documents' sources and clusters with their first experts; `dead_experts`, over all layers; these three are
        None for an ensemble. `unseen` is the perplexity on text of `evaluation.sources`, None without them; `curve` has the
        measurements of the held-out loss (`accounting.Point`); an ensemble's last one is its evaluation.
    """
    plan = build_plan(config)
    phases = account(config, plan, found(config, arm.measured))
    tokens = trained_tokens(phases)
    events = EventLog.read(config.directory / "events.jsonl")
    meter = Meter()
    for event in events:
        meter.update(event)
    evaluation = read_json(config.directory / "evaluation" / "evaluation.json")
    figures = evaluation["ensemble"] if arm.measured == "ensemble" else evaluation
    points = curve(events, phases, config)
    if arm.measured == "ensemble":
        before = [phase for phase in phases if phase.stage != "evaluate"]
        points.append(Point(
            "finetune", tokens, dollars_of(before), hours_of(before), metered_dollars(meter, config), wall_hours(events),
            figures["loss"]))
    return {
        "arm": name, "title": arm.title, "budget": budget, "run": config.name,
        "recipe": recipe(config), "subject": subject(config, plan), "measured": arm.measured,
        "tokens": tokens, "flops": sum(phase.flops for phase in phases),
        "dollars": dollars_of(phases), "hours": hours_of(phases),
        "phases": [dataclasses.asdict(phase) for phase in phases],
        "metered_dollars": metered_dollars(meter, config), "worker_seconds": meter.worker_seconds,
        "loss": figures["loss"], "perplexity": figures["perplexity"], "bits_per_byte": figures["bits_per_byte"],
        **_looked_at(figures), "unseen": _unseen(evaluation) if arm.measured == "finetune" else None,
        "curve": [dataclasses.asdict(point) for point in points],
    }


def _looked_at(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures that an evaluation reports about a model in addition to its loss."""
    if "routers" not in figures:
        return dict.fromkeys(("sources", "specialisation", "dead_experts"))
    return {
        "sources": {source["source"]: source["perplexity"] for source in figures["sources"]},
        "specialisation": figures["specialisation"],
        "dead_experts": sum(router["dead"] for router in figures["routers"])}


def _unseen(evaluation: Mapping[str, Any]) -> float | None:
    return float(evaluation["unseen"]["perplexity"]) if "unseen" in evaluation else None


def add_target(rows: Sequence[dict[str, Any]]) -> float:
    """Add to each row the cost to reach joint training's last held-out loss: `dollars_to_target` and `hours_to_target`.

    Args:
        rows: Rows of the comparison, the reference first.

    Returns:
        Joint training's last held-out loss.
    """
    target = float(rows[0]["curve"][-1]["loss"])
    for row in rows:
        points = [Point(**point) for point in row["curve"]]
        row["dollars_to_target"] = first_reach(points, target, "dollars")
        row["hours_to_target"] = first_reach(points, target, "hours")
    return target


def share_corpus(config: RunConfig, others: Sequence[Path]) -> None:
    """Give a run the corpus of another run with the same corpus settings, by hard links.

    Raises:
        RunDirError: The directory holds a run with other settings.
    """
    directory = pipeline.claim(config, redo=False)
    stage = next(stage for stage in stages.STAGES if stage.name == "corpus")
    digest = stages.fingerprints(config, input_identity(config))[stage.name]
    target = directory / stage.directory
    if is_done(target, digest):
        return
    for other in others:
        if is_done(other / stage.directory, digest):
            draft = target.with_name(f".{target.name}.shared")
            shutil.rmtree(draft, ignore_errors=True)
            shutil.copytree(other / stage.directory, draft, copy_function=os.link)
            shutil.rmtree(target, ignore_errors=True)
            draft.rename(target)
            return
