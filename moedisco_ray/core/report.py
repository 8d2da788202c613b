"""`report.json`: everything the final table, the model card and the figures show, from what the stages left behind.

Keys of the report; a figure that nobody measured is null:

* `name`, `seed`, `tags`, `family`: of the run's configuration. `start`: `kind` (`random`, `checkpoint` or `upcycle`) and `name`, of
  the directory that it names, without its path.
* `stages`: one entry per committed stage, in pipeline order:
  `name`; `pool` (`low_memory`, `high_memory` or `head`); `workers`, that ran at once, of a gang on average; `seconds`,
  wall-clock of its last completion; `tokens`, trained on; `worker_seconds` and `dollars`, the stage's lines of the bill, 0 where it
  holds no priced slot; `training_worker_seconds`, of the training loops, without start-ups; `stalled`, the share of the training's
  seconds for which it stood still while checkpoints were saved; `loss`, training loss at the end, nats per token, mean over
  units weighted by tokens; `perplexity` and `bits_per_byte` on validation documents (of `submodels`: each on its own cluster).
  Of `submodels` also `unfinished`: one {`name`, `contribution` (`checkpoint` or `seed`), `steps`, `planned_steps`, `reason`} for
  each sub-model that the merge did not wait for.
* `tokens`: trained on, summed over stages.
* `bill`: what the run has cost (`moedisco_ray.core.bill.Bill`): lines, totals, idle machines, time, baseline, saving, quality.
* `rounds`: one entry per round after which the sub-models' backbones became one: `members`, the tokens of each by name;
  `late`, the names of those it did not wait for. Empty where they never met.
* `corpus`: the corpus stage's summary. `clusters`: `clusters/report.json`. `evaluation`: `evaluation/evaluation.json`.
* `merge`: the merge stage's summary: `backbone` (`rule`, `scale`), `weights`, `candidates` (`rule`, `scale`, `loss` of each,
  where they were compared), `layers` (of each router: accuracy, loads, scale).
* `samples`: [{prompt, text}], what the finished model wrote.
* `curves`: {unit: {`stage`, `tokens` [..], `loss` [..]}}, training loss over the unit's tokens, at most 400 points.
* `held_out`: the same of the held-out loss, of units for which `evaluation.every_tokens` asks for it.
* `versions`: {package: version} that made the newest stage.

What a stage's summary must hold for this: seed, submodels and finetune have `units`, each with `name`, `steps` of
`planned_steps`, `tokens`, `loss`, `seconds` (of the loop), `workers` (on average), `held` (worker-seconds, by what the
meter calls the machines), `contribution` and `reason` (see `policies.quorum`). The cluster stage has `held` too, empty where
no worker of a pool made its vectors. The evaluation's has `extra_seconds`, spent on other models than the finished one, and the
export's `samples`. `comparison.json`, which a comparison leaves in a run directory, says in `quality` what is known of quality.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from moedisco_ray.core.artifacts import Manifest, parse_manifest, versions
from moedisco_ray.core.bill import Bill, format_dollars, format_seconds, metered_bill
from moedisco_ray.core.config import LocalInit, Model, RunConfig
from moedisco_ray.core.events import Event, EventLog, EventType
from moedisco_ray.core.metering import Meter
from moedisco_ray.core.stages import STAGES

T = TypeVar("T")
PoolName = Literal["low_memory", "high_memory", "head"]
ReadFile = Callable[[str], bytes | None]
"""Reads a file of a run directory by its path in there; None: there is no such file."""

CURVE_POINTS = 400

TABLE_COLUMNS = ("stage", "pool", "workers", "tokens", "time", "cost", "loss", "perplexity")

_ON_LOW_MEMORY = ("seed", "submodels")
_WITH_THE_GANG = ("merge", "finetune", "evaluate", "export")
"""Stages that work on the whole MoE, in the pool that fine-tunes it."""
_TRAINING = ("seed", "submodels", "finetune")


def build_report(run_dir: Path, config: RunConfig, last: Event | None = None) -> dict[str, Any]:
    """Gather the report of a run, finished or not; see the module's text for its keys.

    Args:
        run_dir: The run directory.
        config: The run's configuration: pools and their prices.
        last: The event that is about to end the run and is not in its log yet.
    """
    return report_of(functools.partial(_file, run_dir), config, last)


def report_of(read: ReadFile, config: RunConfig, last: Event | None = None) -> dict[str, Any]:
    """As `build_report`, from files that are opened by the caller's rules."""
    manifests = {
        stage.name: manifest for stage in STAGES
        if (content := read(f"{stage.directory}/manifest.json")) is not None and (manifest := parse_manifest(content)) is not None}
    evaluation = _document(read("evaluation/evaluation.json"))
    measured = evaluation.get("stages", {})
    events = [*EventLog.parse(read("events.jsonl") or b""), *([] if last is None else [last])]
    stalls = _stalls(events)
    bill = _bill(events, config, _document(read("comparison.json")).get("quality"))
    stages = [
        _stage(name, manifest, measured.get(name, {}), stalls.get(name, 0.0), config, bill)
        for name, manifest in manifests.items()]
    newest = max(manifests.values(), key=lambda manifest: manifest.created, default=None)
    return {
        "name": config.name,
        "seed": config.seed,
        "tags": dict(config.tags),
        "family": config.model.family,
        "start": _start(config.model),
        "stages": stages,
        "tokens": sum(stage["tokens"] or 0 for stage in stages),
        "bill": bill.model_dump(mode="json"),
        "rounds": manifests["submodels"].summary.get("rounds", []) if "submodels" in manifests else [],
        "corpus": manifests["corpus"].summary if "corpus" in manifests else {},
        "merge": manifests["merge"].summary if "merge" in manifests else {},
        "clusters": _document(read("clusters/report.json")),
        "evaluation": evaluation,
        "samples": manifests["export"].summary.get("samples", []) if "export" in manifests else [],
        "curves": read_curves(events),
        "held_out": read_curves(events, "evaluation", "held_out_loss"),
        "versions": newest.versions if newest is not None else versions(),
    }


def _start(model: Model) -> dict[str, str | None]:
    if isinstance(model.init, LocalInit):
        return {"kind": model.init.KEY, "name": model.init.directory.name}
    return {"kind": model.init, "name": None}


def read_curves(events: Iterable[Event], kind: EventType = "progress", key: str = "loss") -> dict[str, dict[str, Any]]:
    """Loss over tokens of every unit that told it: in training, unless another kind of event is named.

    A unit that went back to an earlier step (resumed from a checkpoint, or begun again) loses what it had reported from
    there on: a curve holds each step once, as it was last trained.

    Args:
        events: Of a run, in order.
        kind: Which events tell it.
        key: Under which name.

    Returns:
        {unit: {stage, tokens [P], loss [P]}} with P at most `CURVE_POINTS`.
    """
    points: dict[str, list[tuple[int, int, float]]] = {}
    stages: dict[str, str | None] = {}
    for event in events:
        if event.type != kind or event.unit is None or event.data.get(key) is None:
            continue
        step = int(event.data["step"])
        curve = points.setdefault(event.unit, [])
        while curve and curve[-1][0] >= step:
            curve.pop()
        curve.append((step, int(event.data["tokens"]), float(event.data[key])))
        stages[event.unit] = event.stage
    curves = {}
    for unit, curve in points.items():
        kept = thin(curve, CURVE_POINTS)
        curves[unit] = {
            "stage": stages[unit], "tokens": [tokens for _, tokens, _ in kept], "loss": [loss for _, _, loss in kept]}
    return curves


def thin(values: Sequence[T], most: int) -> Sequence[T]:
    """At most `most` of the values, evenly spaced, the first and the last among them."""
    if len(values) <= most:
        return values
    return [values[i * (len(values) - 1) // (most - 1)] for i in range(most)]


def report_table(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The run's table, as text: stages, their total, idle machines, the total with them, and full training.

    The time of idle machines is slot-time.

    Returns:
        Rows of `TABLE_COLUMNS`.
    """
    rows: list[tuple[str, ...]] = [
        (
            stage["name"], stage["pool"].replace("_", "-"), str(stage["workers"]), _tokens(stage["tokens"]),
            format_seconds(stage["seconds"]), format_dollars(stage["dollars"]), _decimal(stage["loss"], 4),
            _decimal(stage["perplexity"], 2),
        )
        for stage in report["stages"]
    ]
    bill = Bill.model_validate(report["bill"])
    tokens = _tokens(report["tokens"])
    rows.append(("total", "", "", tokens, format_seconds(bill.seconds), format_dollars(bill.dollars), "", ""))
    for line in bill.idle:
        slot_time, dollars = format_seconds(line.worker_seconds), format_dollars(line.dollars)
        rows.append(("idle machines", line.pool.replace("_", "-"), "", "", slot_time, dollars, "", ""))
    if bill.idle:
        rows.append(("total with idle machines", "", "", "", "", format_dollars(bill.dollars_with_idle), "", ""))
    if bill.complete and bill.baseline is not None:
        rows.append((
            "full training (estimate)", "high-memory", "", tokens, format_seconds(bill.baseline.seconds),
            format_dollars(bill.baseline.dollars), "", ""))
    return rows


def report_verdict(report: Mapping[str, Any]) -> str | None:
    """The saving in words, with the baseline's nature and what is known of quality; None where there is no saving."""
    return Bill.model_validate(report["bill"]).verdict


def report_notes(report: Mapping[str, Any]) -> list[str]:
    """What the table cannot say: sub-models that the merge did not wait for, and what is wrong with the text or its clusters."""
    return [
        *report.get("corpus", {}).get("warnings", []), *report.get("clusters", {}).get("warnings", []), *(
        f"{unit['name']} is not finished: the merge took "
        + (f"its checkpoint of step {unit['steps']} of {unit['planned_steps']}" if unit["contribution"] == "checkpoint"
           else "its seed, untrained")
        + f" ({unit['reason']})"
        for stage in report["stages"] for unit in stage.get("unfinished", []))
    ]


def _stalls(events: Iterable[Event]) -> dict[str, float]:
    """Seconds for which each stage's trainings stood still for checkpoints."""
    stalls: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if event.type == "checkpoint" and event.stage is not None:
            stalls[event.stage] += event.data["stall"]
    return stalls


def _stage(
    name: str, manifest: Manifest, measured: dict[str, Any], stall: float, config: RunConfig, bill: Bill,
) -> dict[str, Any]:
    summary = manifest.summary
    units = summary.get("units", [])
    tokens = sum(unit["tokens"] for unit in units)
    workers = _workers(name, units, config)
    lines = [line for line in bill.lines if line.stage == name]
    pool = "low_memory" if name == "cluster" and lines else _pool(name, config)
    training_seconds = sum(unit["seconds"] for unit in units)
    loop_seconds = sum(unit["seconds"] * unit["workers"] for unit in units)
    trained = [unit for unit in units if unit["tokens"] and unit["loss"] is not None]
    return {
        "name": name,
        "pool": pool,
        "workers": workers,
        "seconds": manifest.seconds,
        "tokens": tokens if name in _TRAINING else None,
        "worker_seconds": sum(line.worker_seconds or 0.0 for line in lines),
        "training_worker_seconds": loop_seconds if units else None,
        "stalled": stall / training_seconds if training_seconds else None,
        "dollars": sum(line.dollars or 0.0 for line in lines),
        "loss": sum(unit["loss"] * unit["tokens"] for unit in trained) / tokens if trained else None,
        "perplexity": measured.get("perplexity"),
        "bits_per_byte": measured.get("bits_per_byte"),
        **({"unfinished": _unfinished(units)} if name == "submodels" else {}),
    }


def _pool(stage: str, config: RunConfig) -> PoolName:
    if stage in _WITH_THE_GANG:
        return config.finetune.pool
    return "low_memory" if stage in _ON_LOW_MEMORY else "head"


def _unfinished(units: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = ("name", "contribution", "steps", "planned_steps", "reason")
    return [{key: unit[key] for key in keys} for unit in units if unit["contribution"] != "finished"]


def _workers(name: str, units: list[dict[str, Any]], config: RunConfig) -> float:
    if name == "submodels":
        return min(len(units) or config.clusters.count, config.pools.low_memory.max_workers)
    if name != "finetune" or not units:
        return 1
    mean = round(units[0]["workers"], 1)
    return int(mean) if mean.is_integer() else mean


def _bill(events: Iterable[Event], config: RunConfig, quality: str | None) -> Bill:
    meter = Meter()
    for event in events:
        meter.update(event)
    return metered_bill(meter, config, quality)


def _file(run_dir: Path, path: str) -> bytes | None:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return (run_dir / path).read_bytes()
    return None


def _document(content: bytes | None) -> dict[str, Any]:
    found: dict[str, Any] = {} if content is None else json.loads(content)
    return found


def _tokens(tokens: int | None) -> str:
    return "-" if tokens is None else f"{tokens:,}"


def _decimal(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
