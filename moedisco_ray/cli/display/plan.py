"""A plan as tables of memory, tokens, hours and dollars per stage, with advice on what to change."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moedisco_ray.cli.display.formatting import PlainTable, count, gigabytes
from moedisco_ray.core.records.bill import format_dollars, format_seconds
from moedisco_ray.core.stages import training_stage
from moedisco_ray.plan import GIB, Parameters, Plan, StagePlan, Sync, readings
from moedisco_ray.plan.files import StageStorage
from moedisco_ray.plan.gang_traffic import GangTraffic
from moedisco_ray.plan.worker_plan import WorkerPlan

_ROUNDED = (
    "loss: above joint training at equal tokens, measured with small models; not in it is what bf16 weights, fp8 "
    "optimizer state or updates in blocks cost, which make a way fit"
)


def plan_view(plan: Plan) -> RenderableType:
    """A plan as tables of parameters, memory, time and cost, with advice on what to change."""
    parts: list[RenderableType] = [
        Text.assemble((plan.name, "bold"), f"  {plan.family}, {_parts(plan)}, vocabulary {plan.vocab_size:,}"),
        *(
            Padding(table(plan), (1, 0, 0, 0))
            for table in (_parameters, _memory, *((_cost,) if plan.bill.lines else ()), _storage, _alternatives)
        ),
    ]
    if any(stage.types for stage in plan.stages):
        parts.append(Padding(_types(plan), (1, 0, 0, 0)))
    if any(way.rounded for way in plan.alternatives):
        parts.append(Text(_ROUNDED, style="dim"))
    parts += [
        Text(f"{stage.stage} fits {stage.pool_gb:g} GiB with {stage.choice}; the run uses these settings")
        for stage in plan.stages
        if stage.choice is not None
    ]
    parts += [
        Text(f"! {_misfit(stage)}: {stage.remedy}", style="yellow")
        for stage in (*plan.stages, *plan.inference)
        if stage.remedy is not None
    ]
    parts += [
        Text(_synced(stage.stage, stage.sync, over_network=stage.fits_known))
        for stage in plan.stages
        if stage.sync is not None
    ]
    parts += [Text(_exchanged(stage.stage, stage.traffic)) for stage in plan.stages if stage.traffic is not None]
    # Of joint training, the table has the other pool.
    if len(plan.stages) > 1 and plan.finetune_elsewhere is not None and plan.finetune_elsewhere.fits_known:
        parts.append(Text(_elsewhere(plan.stages[-1], plan.finetune_elsewhere)))
    if (read := readings(plan)) is not None:
        note, is_often = read
        parts.append(Text(f"! {note}" if is_often else note, style="yellow" if is_often else ""))
    parts += [Text(str(idle)) for idle in plan.idle]
    if plan.recipe is not None:
        parts.append(Text(plan.recipe))
    if plan.verdict is not None:
        parts.append(Text(plan.verdict, style="bold"))
    if not plan.fits_known:
        parts.append(
            Text(
                "Memory is an upper bound for one worker. Workers without GPUs share their host's memory with other "
                "processes: whether they fit is unknown.",
                style="dim",
            )
        )
    parts += [Text(f"Speed of {speed.pool.replace('_', '-')}: {speed.source}", style="dim") for speed in plan.speeds]
    parts.append(Text(f"Assumed: {plan.assumptions}", style="dim"))
    return Group(*parts)


def _misfit(stage: WorkerPlan) -> str:
    if stage.memory.total > stage.pool_gb * GIB:
        return f"{stage.stage} does not fit {stage.pool_gb:g} GiB"
    return stage.shortage


def _synced(stage: str, sync: Sync, *, over_network: bool) -> str:
    waits = f"; each model waits {format_seconds(sync.wait_seconds)}" if over_network else ""
    return f"{stage} sync {sync.syncs} times: {gigabytes(sync.bytes)} GiB through storage{waits}"


def _exchanged(stage: str, traffic: GangTraffic) -> str:
    line = f"{stage}: each worker sends {gigabytes(traffic.bytes)} GiB per step, in {format_seconds(traffic.seconds)}"
    if traffic.divided < traffic.bytes:
        divided = gigabytes(traffic.divided)
        return f"{line}; {divided} GiB where one node has {traffic.expert} of them (finetune.parallel.expert)"
    if traffic.bytes < traffic.sharded:
        return f"{line}; {gigabytes(traffic.sharded)} GiB if all weights were sharded"
    return line


def _elsewhere(here: StagePlan, there: StagePlan) -> str:
    where = f"finetune.pool={there.pool}, {there.workers} worker{'s' if there.workers > 1 else ''}"
    if not there.fits:
        return f"{where}: the fine-tune would not fit {there.pool_gb:g} GiB"
    costs, now = (
        f"{format_dollars(each.cost.dollars)} in {format_seconds(3600 * each.cost.hours)}" for each in (there, here)
    )
    chosen = "" if there.choice is None else f" with {there.choice}"
    return f"{where}: the fine-tune would cost {costs}{chosen}, instead of {now}, both without starts of workers"


def _parts(plan: Plan) -> str:
    if not any(training_stage(stage.stage).per_cluster for stage in plan.stages):
        return "no sub-models"
    plural = "s" if plan.experts_per_submodel > 1 else ""
    why = " (clusters.count: auto)" if plan.clusters_chosen else ""
    return f"{plan.clusters} sub-models of {plan.experts_per_submodel} expert{plural} per layer{why}"


def _parameters(plan: Plan) -> Table:
    models: dict[str, Parameters] = {
        "mixture" if training_stage(stage.stage).trains_whole else "sub-model": stage.parameters
        for stage in plan.stages
    }
    models["mixture"] = plan.parameters
    roles = [
        "total",
        "active",
        "embedding",
        "attention",
        "norms",
        "router",
        "experts",
        "shared_expert",
        "dense",
        "head",
    ]
    if not plan.parameters.dense:
        roles.remove("dense")
    table = PlainTable("parameters", *(role.partition("_")[0] for role in roles))
    for name, model in models.items():
        table.add_row(name, *(count(getattr(model, role)) for role in roles))
    return table


def _memory(plan: Plan) -> Table:
    table = PlainTable(
        "GiB per worker",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "copies",
        "step",
        "overhead",
        "total",
        "pool",
        "",
    )
    for stage in (*plan.stages, *plan.inference):
        verdict = Text("does not fit", "bold red")
        if stage.fits:
            verdict = Text("fits", "green") if stage.fits_known else Text("not known", "yellow")
        table.add_row(
            stage.stage,
            *(gigabytes(size) for size in stage.memory.parts.values()),
            gigabytes(stage.memory.total),
            f"{stage.pool_gb:g}",
            verdict,
        )
    return table


def _cost(plan: Plan) -> Table:
    table = PlainTable("stage", "pool", "models x workers", "steps", "tokens", "time", "worker time", "dollars")
    trained: dict[str, StagePlan] = {stage.stage: stage for stage in plan.stages}
    for each in plan.estimates:
        stage = trained.get(each.stage)
        cells = ("", "", "")
        if stage is not None:
            workers = f"{stage.units} x {stage.workers // stage.at_once}"
            cells = (workers, f"{stage.steps:,}", count(stage.cost.tokens))
        held = "" if each.pool == "head" else format_seconds(each.worker_seconds)
        table.add_row(
            each.stage,
            each.pool.replace("_", "-"),
            *cells,
            format_seconds(each.seconds),
            held,
            "" if each.pool == "head" else format_dollars(each.dollars),
        )
    table.add_section()
    bill = plan.bill
    table.add_row(
        Text("total", "bold"),
        "",
        "",
        "",
        count(plan.tokens),
        format_seconds(bill.seconds),
        "",
        Text(format_dollars(bill.dollars), "bold"),
    )
    return table


def _alternatives(plan: Plan) -> Table:
    costs = any(way.dollars for way in plan.alternatives)
    has_cards = any(way.kilowatt_hours is not None for way in plan.alternatives)
    columns = [*(["dollars"] if costs else []), *(["kWh"] if has_cards else [])]
    table = PlainTable("ways to train it", "time", *columns, "loss", "GiB per card", "limit")
    for way in plan.alternatives:
        fits = way.limit is None
        energy = "" if way.kilowatt_hours is None else f"{way.kilowatt_hours:,.1f}"
        table.add_row(
            Text(way.name, "bold" if way.way == "run" else ""),
            format_seconds(way.seconds) if fits else "",
            *([format_dollars(way.dollars) if fits else ""] if costs else []),
            *([energy] if has_cards else []),
            " ".join(["" if way.gap is None else f"{way.gap:+.2f}", *way.rounded]),
            "" if way.memory_gb is None else f"{way.memory_gb:.1f}",
            Text(way.limit or "", "yellow"),
        )
    return table


def _storage(plan: Plan) -> Table:
    table = PlainTable(
        "GiB", "stored", "checkpoints", "card", "memory", "disk per node", "disk per worker", "moved", "exchanged"
    )
    for stage in plan.storage:
        table.add_row(stage.stage, *_stored(stage))
    table.add_section()
    peak = max((stage.checkpoints for stage in plan.storage), default=0)
    table.add_row(
        Text("run directory", "bold"),
        gigabytes(sum(stage.stored for stage in plan.storage)),
        gigabytes(peak),
        "",
        "",
        "",
        "",
        gigabytes(sum(stage.moved for stage in plan.storage)),
        gigabytes(sum(stage.exchanged for stage in plan.storage)),
    )
    has_large = plan.joint_training.fits_known or not plan.fits_known
    if len(plan.stages) > 1 and has_large:  # else the run is joint training, or there are no large cards
        table.add_row(Text("joint training", "dim"), *_stored(plan.joint_training_storage))
    return table


def _stored(stage: StageStorage) -> tuple[str, ...]:
    disks = (gigabytes(stage.node_disk), gigabytes(stage.worker_disk))
    if stage.pool == "cpu":
        disks = ("", disks[1] if stage.worker_disk else "")
    card, memory, exchanged = (
        gigabytes(size) if size else "" for size in (stage.device_memory, stage.worker_memory, stage.exchanged)
    )
    return (
        gigabytes(stage.stored),
        gigabytes(stage.checkpoints),
        card,
        memory,
        *disks,
        gigabytes(stage.moved),
        exchanged,
    )


def _types(plan: Plan) -> Table:
    table = PlainTable("low-memory type", "stage", "tag", "GiB", "", "models", "worker-hours", "dollars")
    for stage in plan.stages:
        for share in stage.types:
            verdict = Text("fits", "green") if share.fits else Text("too small", "yellow")
            table.add_row(
                share.name,
                stage.stage,
                share.resource,
                f"{share.memory_gb:g}",
                verdict,
                str(share.units),
                f"{share.worker_hours:.2f}",
                format_dollars(share.dollars),
            )
    return table
