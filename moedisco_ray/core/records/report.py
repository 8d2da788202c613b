"""Build `report.json` (`run_record.RunReport`) from the stages' outputs, for the table, model card and figures.

The outputs are the manifests with summaries (`records`), `clusters/report.json`, `evaluation/evaluation.json`, the
event log, and `comparison.json`, in which a comparison with other ways to train states what is known of quality.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moedisco_ray.core.config import LocalInit, Model, RunConfig
from moedisco_ray.core.config.renamed import stored_config
from moedisco_ray.core.config.starts import with_recorded_way
from moedisco_ray.core.records.apart import apart_note, of_result
from moedisco_ray.core.records.bill import QUALITY_UNKNOWN, Bill, format_dollars, format_seconds
from moedisco_ray.core.records.cut import DecomposeSummary
from moedisco_ray.core.records.event_totals import EventTotals
from moedisco_ray.core.records.events import Event, EventLog
from moedisco_ray.core.records.export_summary import Sample
from moedisco_ray.core.records.findings import against_start
from moedisco_ray.core.records.measurements import MEASUREMENTS, machine_notes, read_measurements
from moedisco_ray.core.records.metered import metered_bill
from moedisco_ray.core.records.outdated import REMEDY, outdated_stages
from moedisco_ray.core.records.run_record import (
    SCHEMA_VERSION,
    MachineNote,
    RunReport,
    StageReport,
    StartRecord,
    UnfinishedUnit,
)
from moedisco_ray.core.records.summaries import (
    ClusterReport,
    ClusterSummary,
    CorpusSummary,
    Departure,
    EvaluationRecord,
    Figures,
    MergeSummary,
    TrainingSummary,
    UnitRecord,
)
from moedisco_ray.core.stages import OF_CLUSTERS, STAGES, Stage, TrainingStage, stage_named
from moedisco_ray.core.store.artifacts import Manifest, parse_manifest, versions
from moedisco_ray.core.store.manifests import MANIFEST
from moedisco_ray.core.store.run_models import model_name

ReadFile = Callable[[str], bytes | None]
"""Function that takes a relative path in a run directory and returns the file's content, or None if the file does not
exist."""

TABLE_COLUMNS = ("stage", "pool", "workers", "tokens", "time", "cost", "training loss", "held-out perplexity")


def build_report(run_dir: Path, config: RunConfig, last: Event | None = None) -> RunReport:
    """Gather the report of a run, finished or not.

    Args:
        run_dir: The run directory.
        config: The run's configuration: pools and their prices.
        last: The event that is about to end the run and is not in its log yet.
    """
    return report_of(functools.partial(_file, run_dir), config, last)


def report_of(read: ReadFile, config: RunConfig, last: Event | None = None) -> RunReport:
    """Build the report like `build_report`, with the caller's function to read files."""
    manifests = {
        stage.name: manifest
        for stage in STAGES
        if (manifest := parse_manifest(read(f"{stage.directory}/{MANIFEST}"), stage.directory)) is not None
    }
    summaries = {name: manifest.summary for name, manifest in manifests.items()}
    recorded = _recorded(read)
    outdated = outdated_stages(recorded or config, manifests)
    config = _with_cluster_count(config, summaries)
    if recorded is not None:
        config = with_recorded_way(config, recorded)
    if recorded is not None and not config.model.known:
        known = {"family": recorded.model.family, "config": recorded.model.config}
        config = config.model_copy(update={"model": config.model.model_copy(update=known)})
    evaluation = EvaluationRecord.model_validate(_document(read("evaluation/evaluation.json")))
    owners = {f"submodel-{k}": config.owner_of(k) for k in range(config.shared_clusters, config.cluster_count)}
    events = EventTotals(
        itertools.chain(EventLog.parse(read("events.jsonl") or b""), [] if last is None else [last]), owners
    )
    stalls, utilisation = events.stalls, events.mfu
    bill = metered_bill(events.meter, config, _document(read("comparison.json")).get("quality"))
    stages = [
        _stage(
            name,
            manifest,
            evaluation.stages.get(name, Figures()),
            stalls.get(name, 0.0),
            mfu=utilisation.get(name),
            config=config,
            bill=bill,
            outdated=name in outdated,
        )
        for name, manifest in manifests.items()
    ]
    newest = max(manifests.values(), key=lambda manifest: manifest.created, default=None)
    trained = {each: TrainingSummary.model_validate(summaries.get(each, {})) for each in ("seed", "submodels")}
    whole_seed = config.cluster_count == 1 and not trained["submodels"].units  # it has all experts
    members = len(trained["seed"].units) or None if whole_seed else None
    return RunReport(
        schema_version=SCHEMA_VERSION,
        against_start=against_start(of_result(evaluation), evaluation.start),
        submodels_apart=apart_note(evaluation),
        name=config.name,
        seed=config.seed,
        tags=dict(config.tags),
        family=config.model.family_name if config.model.known else config.model.family or "unknown",
        start=_start(config.model),
        stages=stages,
        tokens=sum(stage.tokens or 0 for stage in stages),
        bill=bill,
        members=members,
        syncs=trained["submodels"].syncs or (trained["seed"].syncs if members else []),
        corpus=CorpusSummary.model_validate(summaries.get("corpus", {})),
        decompose=DecomposeSummary.model_validate(summaries.get("decompose", {})),
        merge=MergeSummary.model_validate(summaries.get("merge", {})),
        clusters=ClusterReport.model_validate(_document(read("clusters/report.json"))),
        evaluation=evaluation,
        samples=[Sample.model_validate(sample) for sample in summaries.get("export", {}).get("samples", [])],
        curves=events.losses.curves(),
        held_out=events.held_out.curves(),
        machines=_machines(read),
        left=_departures(summaries, events.sizes, owners, config),
        versions=newest.versions if newest is not None else versions(),
    )


def _machines(read: ReadFile) -> list[MachineNote]:
    content = read(MEASUREMENTS)
    return [] if content is None else machine_notes(read_measurements(content, MEASUREMENTS))


def _recorded(read: ReadFile) -> RunConfig | None:
    """The run's own `config.json`, with all that was decided when it began; None for a run that waits.

    A control service gives the configuration as it was submitted, whose prices no file of the run may change.
    """
    with contextlib.suppress(ValueError):  # a damaged file, or one of another version
        return stored_config(json.loads(read("config.json") or b"{}"))
    return None


def _with_cluster_count(config: RunConfig, summaries: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """The configuration with the number of clusters that the run has made, if it was asked to decide the number."""
    if config.clusters.count != "auto":
        return config
    made = len(ClusterSummary.model_validate(summaries.get("cluster", {})).clusters)
    clusters = config.clusters.model_copy(update={"count": max(made, len(config.owners) + 1)})
    return config.model_copy(update={"clusters": clusters})


def _departures(
    summaries: Mapping[str, Mapping[str, Any]],
    sizes: Mapping[str, int],
    owners: Mapping[str, str | None],
    config: RunConfig,
) -> list[Departure]:
    """What left each data owner's storage, by owner: what the stages have noted, and the events of its training."""
    noted = [
        Departure.model_validate(each) for stage in STAGES for each in summaries.get(stage.name, {}).get("left", [])
    ]
    noted += [
        Departure(owner=owner, what=f"{unit}: loss and speed of its training, in events.jsonl", bytes=sizes[unit])
        for unit, owner in owners.items()
        if owner is not None and unit in sizes
    ]
    return sorted(noted, key=lambda each: config.owners.index(each.owner))


def _start(model: Model) -> StartRecord:
    if isinstance(model.init, LocalInit):
        return StartRecord(kind=model.init.KEY, name=model_name(model.init.place))
    return StartRecord(kind=model.init, name=None)


def report_table(report: RunReport) -> list[tuple[str, ...]]:
    """The run's cost table, as text: stages, total, idle machines, total with idle machines, and joint training.

    The time of idle machines is summed over their slots.

    Returns:
        Rows of `TABLE_COLUMNS`.
    """
    rows: list[tuple[str, ...]] = [
        (
            f"{stage.name}{' (out of date)' if stage.outdated else ''}",
            stage.pool.replace("_", "-"),
            f"{stage.workers:g}",
            _tokens(stage.tokens),
            format_seconds(stage.seconds),
            format_dollars(stage.dollars),
            _decimal(stage.loss, 4),
            _decimal(stage.perplexity, 2),
        )
        for stage in report.stages
    ]
    bill, tokens = report.bill, _tokens(report.tokens)
    rows.append(("total", "", "", tokens, format_seconds(bill.seconds), format_dollars(bill.dollars), "", ""))
    for line in bill.idle:
        slot_time, dollars = format_seconds(line.worker_seconds), format_dollars(line.dollars)
        rows.append(("idle machines", line.pool.replace("_", "-"), "", "", slot_time, dollars, "", ""))
    if bill.idle:
        rows.append(("total with idle machines", "", "", "", "", format_dollars(bill.dollars_with_idle), "", ""))
    if bill.complete and bill.baseline is not None:
        rows.append(
            (
                f"{bill.baseline.name} (estimate)",
                "",
                "",
                tokens,
                format_seconds(bill.baseline.seconds),
                format_dollars(bill.baseline.dollars),
                "",
                "",
            )
        )
    return rows


def report_verdict(report: RunReport) -> str | None:
    """Which way costs least on the run's machines, and the measured quality; None if neither is known."""
    bill = report.bill
    return bill.verdict or (None if bill.quality == QUALITY_UNKNOWN else bill.quality)


def report_notes(report: RunReport) -> list[str]:
    """Notes below the table: outdated stages, sub-models that the merge did not wait for, and problems of the text."""
    notes: list[str] = []
    if outdated := ", ".join(stage.name for stage in report.stages if stage.outdated):
        notes.append(
            f"{outdated}: out of date, made with other settings or from other artifacts than the run has now; {REMEDY}"
        )
    notes += [*report.corpus.warnings, *report.clusters.warnings]
    notes += [_unfinished_note(unit) for stage in report.stages for unit in stage.unfinished]
    return notes


def _unfinished_note(unit: UnfinishedUnit) -> str:
    taken = "its seed, untrained"
    if unit.contribution == "checkpoint":
        taken = f"its checkpoint of step {unit.steps} of {unit.planned_steps}"
    return f"{unit.name} is not finished: the merge took {taken} ({unit.reason})"


def report_speeds(report: RunReport) -> list[str]:
    """One line on the training speed of each stage that trained."""
    return [_speed(stage) for stage in report.stages if stage.tokens_per_second_per_worker]


def _speed(stage: StageReport) -> str:
    share = "" if stage.mfu is None else f", {100 * stage.mfu:.0f} % of the cards' peak (MFU)"
    return f"{stage.name} trained {stage.tokens_per_second_per_worker or 0:,.0f} tokens/s per worker{share}"


def _stage(
    name: str,
    manifest: Manifest,
    measured: Figures,
    stall: float,
    *,
    mfu: float | None,
    config: RunConfig,
    bill: Bill,
    outdated: bool,
) -> StageReport:
    stage = stage_named(name)
    units = TrainingSummary.model_validate(manifest.summary).units if stage.trains else []
    tokens = sum(unit.tokens for unit in units)
    lines = [line for line in bill.lines if line.stage == name]
    training_seconds = sum(unit.seconds for unit in units)
    worked = sum(unit.seconds * unit.workers for unit in units)
    trained = [(unit.loss, unit.tokens) for unit in units if unit.tokens and unit.loss is not None]
    report = StageReport(
        name=name,
        pool=stage.place(config),
        workers=_workers(stage, units, config),
        seconds=manifest.seconds,
        tokens=tokens if stage.trains else None,
        worker_seconds=sum(line.worker_seconds or 0.0 for line in lines),
        training_worker_seconds=worked if units else None,
        tokens_per_second_per_worker=tokens / worked if worked else None,
        mfu=mfu,
        stalled=stall / training_seconds if training_seconds else None,
        dollars=sum(line.dollars or 0.0 for line in lines),
        loss=sum(loss * count for loss, count in trained) / tokens if trained else None,
        perplexity=measured.perplexity,
        bits_per_byte=measured.bits_per_byte,
        outdated=outdated,
    )
    return report.model_copy(update={"unfinished": _unfinished(units)}) if name in OF_CLUSTERS else report


def _unfinished(units: list[UnitRecord]) -> list[UnfinishedUnit]:
    return [
        UnfinishedUnit(
            name=unit.name,
            contribution=unit.contribution,
            steps=unit.steps,
            planned_steps=unit.planned_steps,
            reason=unit.reason,
        )
        for unit in units
        if unit.contribution != "finished"
    ]


def _workers(stage: Stage, units: list[UnitRecord], config: RunConfig) -> float:
    if not isinstance(stage, TrainingStage):
        return 1
    trainings = len(units) or (config.cluster_count if stage.per_cluster else 0)
    if stage.per_cluster or trainings > 1:
        return min(trainings, stage.at_once(config))
    return round(units[0].workers, 1) if units else 1


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
