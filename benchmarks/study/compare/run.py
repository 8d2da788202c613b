"""Runs the arms one after the other, each in its own run directory, all on the same corpus and tokenizer."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from benchmarks.study.compare.accounting import (
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
from benchmarks.study.compare.arms import ARMS, REFERENCE, Arm, arm_config, chosen, predicted, run_name, tokens_for
from benchmarks.study.compare.reading import actual_reads, evaluated, expected_reads
from benchmarks.study.compare.records import Budget, Comparison, Point, Row, TunedSettings
from benchmarks.study.compare.tuning import Tuned, stored_result, tune
from benchmarks.study.recipe import recipe
from moedisco_ray.backend import Backend
from moedisco_ray.cli.display import View
from moedisco_ray.core import stages
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.renamed import read_stored_config
from moedisco_ray.core.errors import ConfigError, DivergedError
from moedisco_ray.core.records.bill import format_dollars
from moedisco_ray.core.records.events import EventLog
from moedisco_ray.core.records.metering import Meter
from moedisco_ray.core.records.report import report_of
from moedisco_ray.core.records.summaries import EvaluationRecord
from moedisco_ray.core.store.artifacts import is_done, read_manifest, write_json
from moedisco_ray.core.store.checksums import with_checksum
from moedisco_ray.core.store.locations import Location, is_uri, joined
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution import pipeline
from moedisco_ray.packed_tokens import INDEX
from moedisco_ray.plan import build_plan, fitted
from moedisco_ray.plan.machine import known_machine
from moedisco_ray.stages.corpus import input_identity

BUDGETS: tuple[Budget, ...] = ("tokens", "dollars")
"""Budgets for which arms are trained by default."""
_EVERY_BUDGET: tuple[Budget, ...] = (*BUDGETS, "loss")
_READ = ("config.json", "events.jsonl", "corpus", "clusters/cluster_model", "clusters/assignments", "evaluation")
"""What a comparison reads of a finished run."""
_BUDGET_WORDS = {"tokens": "equal tokens", "dollars": "equal planned dollars", "loss": "about the same loss"}


def compare(
    base: RunConfig,
    output: Location,
    names: Sequence[str] = (),
    *,
    budgets: Sequence[Budget] = BUDGETS,
    view: Callable[[], View] | None = None,
    backend: Backend | None = None,
    slice_tokens: int = 0,
) -> Comparison:
    """Train every arm, once at joint training's tokens and once at its planned dollars, and compare the results.

    If requested, also train each arm to joint training's loss, provided that its other two runs allow a prediction of
    the length.

    Dollars include everything in the account (`accounting`), not only training.

    Finished runs are not repeated: an interrupted comparison resumes, and arms that an earlier comparison in the
    same place finished stay in the table.

    Args:
        base: Base configuration; its tokens are those of joint training.
        output: Directory or URI for the arms' run directories and `compare.json`.
        names: Names of the arms to train; empty for all. The reference is always included.
        budgets: Quantities that are made equal to joint training's, `loss` last.
        view: Creates the view of a run, which is closed when the run ends; None shows nothing.
        backend: Backend that runs the work; None uses Ray.
        slice_tokens: Tokens of each short training that tunes an arm's learning rate and batch size (`tuning`); 0
            trains with the configured values.

    Returns:
        Content of `compare.json`.

    Raises:
        ConfigError: There is no such arm, or the configuration does not allow it.
        RunError: A run failed; the same call resumes.
    """
    requested = chosen(names)
    corpus = _store(output, run_name(REFERENCE, "tokens")).directory / "corpus"

    def reads(config: RunConfig, arm: Arm) -> Reads:
        return expected_reads(config, arm.measured, corpus)  # the reference runs first, so its corpus exists

    tuned = {
        **_tune(base, requested, output, slice_tokens, view, backend),
        **_stored_results(base, requested, output, slice_tokens),
    }
    known = {**ARMS, **{name: found.arm for name, found in tuned.items()}}

    def length(arm: Arm, budget: Literal["tokens", "dollars"]) -> int:
        return tokens_for(base, arm, budget, reads, known[REFERENCE])

    rows: list[Row] = []
    finished: list[RunStore] = []
    for (name, arm), budget in itertools.product(known.items(), _EVERY_BUDGET):
        wanted = name in requested and budget in (BUDGETS[:1] if name == REFERENCE else budgets)
        stored = _store(output, run_name(name, budget))
        if not wanted and not stored.has(stored.directory / "config.json"):
            continue
        try:
            config = _config(base, (name, arm), budget, output, length, rows)
        except ConfigError:
            if wanted:
                raise
            continue
        if config is None or not (wanted or pipeline.is_finished(config)):
            continue
        if wanted:
            _run(config, finished, view, backend)
        _fetch(config)
        finished.append(stored)
        rows.append(measured(name, arm, budget, config, tuned[name].settings if name in tuned else None))
    result = Comparison(
        reference=REFERENCE,
        name=base.name,
        seed=base.seed,
        target_loss=rows[0].curve[-1].loss,
        rows=tuple(with_reference(rows)),
    )
    store = RunStore.of(output)
    store.directory.mkdir(parents=True, exist_ok=True)
    write_json(store.directory / "compare.json", result.model_dump(mode="json"))
    store.publish(store.directory / "compare.json")
    _note_quality(output, rows)
    return result


def _config(
    base: RunConfig,
    named: tuple[str, Arm],
    budget: Budget,
    output: Location,
    length: Callable[[Arm, Literal["tokens", "dollars"]], int],
    rows: Sequence[Row],
) -> RunConfig | None:
    """Configuration of an arm's run; None if earlier runs do not predict its tokens to joint training's loss."""
    name, arm = named
    if budget == "loss":
        tokens = predicted([(row.tokens, row.loss) for row in rows if row.arm == name], rows[0].loss)
    else:
        tokens = length(arm, budget)
    return None if tokens is None else arm_config(base, name, arm, output, budget, tokens)


def _tune(
    base: RunConfig,
    requested: Mapping[str, Arm],
    output: Location,
    slice_tokens: int,
    view: Callable[[], View] | None,
    backend: Backend | None,
) -> dict[str, Tuned]:
    """Tune every arm of a comparison; a slice's run directory is removed once the next slice has linked its corpus."""
    slices = joined(output, "slices")
    finished: list[RunStore] = []

    def train(config: RunConfig) -> float | None:
        try:
            _run(config, finished, view, backend)
        except DivergedError:
            return None
        _fetch(config)
        loss = evaluated(config.directory, "ensemble" if config.export.keep_apart == "always" else "finetune").loss
        for before in finished:
            _delete(before)
        finished[:] = [RunStore.of(config.location)]
        return loss

    tuned = (
        {name: tune(base, name, arm, slices, slice_tokens, train) for name, arm in requested.items()}
        if slice_tokens
        else {}
    )
    for last in finished:
        _delete(last)
    _delete(RunStore.of(slices))
    return tuned


def _store(output: Location, name: str) -> RunStore:
    return RunStore.of(joined(output, name))


def _fetch(config: RunConfig) -> None:
    """Make what a comparison reads of a finished run present on this machine."""
    store = RunStore.of(config.location)
    store.fetch(
        *(store.directory / name for name in _READ if store.has(store.directory / name)),
        *(store.directory / "clusters" / "shards" / str(k) / INDEX for k in range(config.cluster_count)),
    )


def _delete(store: RunStore) -> None:
    if store.is_remote:
        store.remote.delete_folder("")
    shutil.rmtree(store.directory, ignore_errors=True)


def _stored_results(
    base: RunConfig, requested: Mapping[str, Arm], output: Location, slice_tokens: int
) -> dict[str, Tuned]:
    """Results of earlier sweeps for arms that this comparison does not train but may have finished runs of."""
    found: dict[str, Tuned] = {}
    for name, arm in ARMS.items() if slice_tokens else ():
        if name not in requested:
            with contextlib.suppress(ConfigError):
                tuned = stored_result(base, name, arm, joined(output, "slices"), slice_tokens)
                found |= {} if tuned is None else {name: tuned}
    return found


def _run(
    config: RunConfig, others: Sequence[RunStore], view: Callable[[], View] | None, backend: Backend | None
) -> None:
    share_corpus(config, others)
    with contextlib.ExitStack() as stack:
        views = () if view is None else (stack.enter_context(contextlib.closing(view())),)
        pipeline.run(
            config, views, backend=backend, ways=build_plan(config, known_machine(config, here=True)).alternatives
        )


def measured(name: str, arm: Arm, budget: Budget, config: RunConfig, tuned: TunedSettings | None = None) -> Row:
    """Quality and cost of an arm's finished run, without what depends on joint training (`with_reference`)."""
    plan = build_plan(config)
    phases = account(config, plan, actual_reads(config, arm.measured))
    tokens = trained_tokens(phases)
    events = EventLog.read(config.directory / "events.jsonl")
    meter = Meter()
    for event in events:
        meter.update(event)
    metered = metered_dollars(meter, config)
    figures = evaluated(config.directory, arm.measured)
    whole = figures if isinstance(figures, EvaluationRecord) else None
    points = curve(events, phases, config)
    if whole is None:
        before = [phase for phase in phases if phase.stage != "evaluate"]
        points.append(
            Point(
                stage="finetune",
                tokens=tokens,
                dollars=dollars_of(before),
                hours=hours_of(before),
                metered_dollars=metered,
                metered_hours=wall_hours(events),
                **figures.model_dump(include={"loss"}),
            )
        )
    return Row(
        arm=name,
        title=arm.title,
        budget=budget,
        run=config.name,
        recipe=recipe(config),
        measured=arm.measured,
        tokens=tokens,
        flops=sum(phase.flops for phase in phases),
        dollars=dollars_of(phases),
        hours=hours_of(phases),
        phases=tuple(phases),
        metered_dollars=metered,
        worker_seconds=meter.worker_seconds,
        sources=whole
        and {source.source: source.perplexity for source in whole.sources if source.perplexity is not None},
        specialisation=whole and whole.specialisation,
        dead_experts=whole and sum(router.dead for router in whole.routers),
        unseen=whole and whole.unseen and whole.unseen.perplexity,
        curve=tuple(points),
        tuned=tuned,
        **figures.model_dump(include={"loss", "perplexity", "bits_per_byte"}),
    )


def with_reference(rows: Sequence[Row]) -> Iterator[Row]:
    """The rows, each with its cost to reach joint training's last held-out loss.

    Args:
        rows: Rows of a comparison, joint training first.
    """
    for row in rows:
        yield row.model_copy(update={"dollars_to_target": first_reach(row.curve, rows[0].curve[-1].loss, "dollars")})


def _note_quality(output: Location, rows: Sequence[Row]) -> None:
    """Write the measured quality into every run directory as `comparison.json`, and update the run's report."""
    joint = rows[0]
    for row in rows[1:]:
        store = _store(output, row.run)
        directory = store.directory
        words = (
            f"A comparison measured held-out perplexity: {row.perplexity:.2f} against {joint.perplexity:.2f} of joint "
            f"training, at {_BUDGET_WORDS[row.budget]} ({format_dollars(row.metered_dollars)} against "
            f"{format_dollars(joint.metered_dollars)}, metered)."
        )
        write_json(directory / "comparison.json", {"quality": words})
        config = read_stored_config((directory / "config.json").read_bytes(), store.location)
        write_json(directory / "report.json", with_checksum(report_of(store.read_newest, config).to_json()))
        store.publish(directory / "comparison.json", directory / "report.json")


def share_corpus(config: RunConfig, others: Sequence[RunStore]) -> None:
    """Give a run the corpus of another run with the same corpus settings, by hard links; a run at a URI makes its own.

    Raises:
        RunDirError: The directory holds a run with other settings.
    """
    if is_uri(config.output):
        return
    config = fitted(config)
    directory = pipeline.claim(config, redo=False)
    stage = next(stage for stage in stages.STAGES if stage.name == "corpus")
    digest = stages.fingerprints(config, input_identity(config))[stage.name]
    target = directory / stage.directory
    if is_done(read_manifest(target), digest, {}):
        return
    for other in (store.directory for store in others):
        if is_done(read_manifest(other / stage.directory), digest, {}):
            draft = target.with_name(f".{target.name}.shared")
            shutil.rmtree(draft, ignore_errors=True)
            shutil.copytree(other / stage.directory, draft, copy_function=os.link)
            shutil.rmtree(target, ignore_errors=True)
            draft.rename(target)
            return
