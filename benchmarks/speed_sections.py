"""The sections of RESULTS.md on the speed of single parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.harness import RESULTS, spread
from benchmarks.page_parts import (
    at_least,
    at_most,
    made_with,
    number,
    prose,
    read,
    section,
    span,
    span_of,
    spans,
    table,
)

_CPU = "processor_ms_per_request"


def training_step() -> str:
    result = read("training_step")
    rows = [[arm, span(speed)] for arm, speed in result["tokens_per_second"].items()]
    verdicts = [at_least(f"`{name}`", result[name], target) for name, target in result["targets"].items()]
    return section(
        "A training step",
        """Steady-state tokens per second of one thread, with the same sizes, data and optimizer. *ours*: the product's
        loop on a one-expert sub-model, with its progress events. *bare*: the shortest PyTorch loop on the dense Hugging
        Face model of the same sizes. *trainer*: the Hugging Face Trainer on that model. *ours-moe* and *trainer-moe*:
        the product's loop and the Trainer on an MoE of 16 experts, with the load-balance loss. *compiled-moe*: the
        product's loop with `optimizer.compile`. Seven tenths of an MoE step are matrix products at the processor's
        peak, the same in every arm. A stack of experts that writes its gradients in place, backward passes that only
        gather, and a fused gate were tried and gained nothing that could be measured; memory that stays in the process
        from step to step changed the speed by -3 to +18 % in four pairs of runs (scripts that are not kept).""",
        table(["arm", "tokens/s, median (min to max)"], rows),
        "\n".join(verdicts),
        made_with(result),
    )


def ray_overhead() -> str:
    result = read("ray_overhead")
    seconds = result["seconds"]
    rows = [
        [stage, span(seconds["ray"][stage]), span(seconds["plain"][stage]), span(adds)]
        for stage, adds in result["ray_adds"].items()
    ]
    return section(
        "What Ray adds to the demo",
        """Seconds per stage of `moedisco run` with the demo preset and fewer tokens: on a local Ray, and in one plain
        process that trains one sub-model after the other. *Outside stages* is the start and stop of Ray.""",
        table(["stage", "on Ray", "plain", "Ray adds"], rows),
        made_with(result),
    )


def seats() -> str:
    result, targets = read("seats"), read("seats")["targets"]
    large = read("seats_256")
    rows = [
        [
            arm,
            *spans(cell, "first_step", "next_step", "slowest_next_step"),
            number(result["head_mb_per_slot"][arm]),
            span(cell["seconds"]),
        ]
        for arm, cell in result["arms"].items()
    ]
    many, ours = large["arms"]["seats"], result["arms"]["seats"]
    setting = large["setting"]
    verdicts = [
        at_most("seconds to the next sub-model's first step", ours["next_step"], targets["next_step"]),
        at_most("MB on the head per slot", spread([result["head_mb_per_slot"]["seats"]]), targets["head_mb_per_slot"]),
        at_most(f"MB of the head, {setting['slots']} slots", many["head_mb"], targets["head_mb"]),
        at_most(
            f"share of time in which a slot waits, {setting['slots']} slots", many["idle_share"], targets["idle_share"]
        ),
    ]
    return section(
        "One-worker training of many sub-models",
        f"""Tiny sub-models on a few slots of one machine. *seats*: the product, one actor per slot that trains one
        sub-model after the other. *trainer*: a Ray Train run with one worker for each sub-model. *long-trainer*: one
        Ray Train run per slot with a fixed list. Seconds from the end of a sub-model's last step to the first step of
        the next one on that slot, and memory of Ray's processes and the driver for each additional slot; workers do not
        count, because they are on other machines. {setting["jobs"]} sub-models on {setting["slots"]} slots of this
        machine took {number(many["seconds"]["median"])} s, the start of {setting["slots"]} processes included; Ray and
        the driver held {number(many["head_mb"]["median"])} MB.""",
        table(["arm", "first step, s", "next step, s", "slowest next step, s", "MB per slot", "whole, s"], rows),
        "\n".join(verdicts),
        made_with(result),
        made_with(large),
    )


def service_load() -> str:
    result = read("service_load")
    setting, targets, readers, report = result["setting"], result["targets"], result["readers"], result["report"]
    asked = {"none": result["requests"], f"{setting['readers']:,}": readers["requests"]}
    requests = [
        [
            f"a page of {setting['page']}" if kind == "page" else "one run",
            streams,
            concurrency,
            *map(span, cell.values()),
        ]
        for streams, kinds in asked.items()
        for kind, cells in kinds.items()
        for concurrency, cell in cells.items()
    ]
    delivery = [
        [when, span(readers[cell]["p50_ms"]), span(readers[cell]["p99_ms"])]
        for when, cell in {"no requests": "delivery", "the requests above": "delivery_busy"}.items()
    ]
    points = {
        "over HTTP, one driver": "one driver",
        "over HTTP, four drivers": "four drivers",
        "`database.ingest`": "direct",
    }
    single, late, share = (
        result["requests"]["run"]["8"]["per_second"],
        readers["delivery"]["p99_ms"],
        result["others_share"],
    )
    verdicts = [
        at_least("metric points per second, over HTTP", report["one driver"], targets["points_per_second"]),
        at_least("metric points per second, directly", report["direct"], targets["points_per_second"]),
        at_least("requests per second for one run, over 8 connections", single, targets["runs_get_per_second"]),
        at_most("delivery of an event to its readers, p99 in ms", late, targets["delivery_p99_ms"]),
    ]
    return section(
        "The service under load",
        f"""`moedisco serve`, one process on SQLite, with {setting["runs"]:,} runs in its database. The clients are
        another process on the same machine. Half of the {setting["readers"]:,} event streams follow one run, whose
        driver makes {setting["reports_per_second"]} reports of {setting["events_per_report"]} events per second. The
        delivery time of an event is measured from the beginning of its report until a reader has it; every reader
        receives every event. Metric points come in reports of {setting["events_per_batch"]:,} progress events with
        {setting["points_per_event"]} points each. Median (min to max) over {setting["rounds"]} rounds, each with a
        fresh service. Other work used {share["median"]:.0%} ({share["min"]:.0%} to {share["max"]:.0%}) of the
        machine.""",
        table(["GET", "event streams", "connections", "requests/s", "p50, ms", "p99, ms"], requests),
        table(["events to readers, at the same time", "p50, ms", "p99, ms"], delivery),
        table(["ingest", "metric points/s"], [[how, span(report[cell])] for how, cell in points.items()]),
        table(["memory of the service", "MiB"], [[when, span(size)] for when, size in result["memory_mib"].items()]),
        "\n".join(verdicts),
        made_with(result),
    )


def service_tabs() -> str:
    result = read("service_tabs")
    setting, here, before = result["setting"], result["here"], result.get("against")
    names = {
        "list_ms": "a page of 50 runs",
        "run_ms": "one run",
        "pools_ms": "the pools",
        "report_ms": "a driver's report",
    }
    arms = {result["commits"]["here"]: here} | ({} if before is None else {result["commits"]["against"]: before})
    rows = [[label, *_quantiles(arms.values(), name)] for name, label in names.items()]
    heads = [f"{commit}, {column}" for commit in arms for column in ("p50, ms", "p99, ms")]
    seconds = setting["seconds_between"]
    return section(
        "Fifty open tabs",
        f"""`moedisco serve`, one process on SQLite, with {setting["runs"]:,} runs. Of {setting["tabs"]} tabs, half
        ask for the list every {number(seconds["list"])} s; the others follow the events of a run, and ask for it
        every {number(seconds["run"])} s and for the pools every {number(seconds["pools"])} s. The drivers of five runs
        report {setting["events_per_minute"]:,} events a minute together. Median (min to max) over {setting["rounds"]}
        rounds of {number(setting["seconds"])} s, each with a fresh service; the commits took turns. Other work used
        {here["others_share"]["median"]:.0%} of the machine.""",
        table(["", *heads], rows),
        table(["", *arms], [["CPU time per request, ms", *(span(arm[_CPU]) for arm in arms.values())]]),
        at_most("p99 of a page of 50 runs, ms", here["list_ms"]["p99_ms"], result["targets"]["list_p99_ms"]),
        made_with(result),
    )


def _quantiles(arms: Iterable[dict[str, Any]], kind: str) -> Iterator[str]:
    for arm in arms:
        yield from spans(arm[kind], "p50_ms", "p99_ms")


def checkpoint_stall() -> str:
    result = read("checkpoint_stall")
    arms, target = result["arms"], result["targets"]["stalled"]
    names = {
        "disk": "disk, in the background",
        "disk-waits": "disk, waiting",
        "s3": "S3, in the background",
        "s3-waits": "S3, waiting",
    }
    rows = [
        [names[arm], *spans(cell, "stalled", "slower", "stall", "latency", "interval")] for arm, cell in arms.items()
    ]
    verdicts = [at_most(f"share of stalls, {names[arm]}", arms[arm]["stalled"], target) for arm in ("disk", "s3")]
    return section(
        "Checkpoints",
        """The share of the time for which training stops to save weights and optimizer state, and how much longer its
        steps take than without checkpoints. *In the background*: the product, which copies them in memory while a
        thread writes. *Waiting*: training continues when the checkpoint is safe. S3 is a server on the same machine and
        shares its cores. Stalls are measured within one training. *Slower by* compares two trainings; other work on the
        machine can give it either sign. The policy's intervals are at least 15 s.""",
        table(["arm", "share of stalls", "slower by", "stall, s", "safe after, s", "interval, s"], rows),
        "\n".join(verdicts),
        made_with(result),
    )


def verification() -> str:
    result = read("verification")
    setting, targets = result["setting"], result["targets"]
    names = {"rename": "write and rename alone", "commit": "write and commit", "verify": "verify"}
    rows = [[name, span(result["seconds"][arm])] for arm, name in names.items()]
    return section(
        "Checksums",
        f"""{setting["gigabytes"]:g} GB of weights in {setting["files"]} files. A commit computes the checksum of each
        file, and waits until the files are on the disk. It takes {span(result["commit_per_gb"])} s per GB more than a
        rename alone, which returns before the disk has the files. The training stage makes {setting["steps"]} steps,
        about a thousandth of the tokens per weight of usual trainings, so its share is an upper bound.""",
        table(["arm", "seconds"], rows),
        "\n".join(
            [
                at_most("share of a training stage", result["stage_share"], targets["stage"]),
                at_most("seconds per GB that is verified", result["verify_per_gb"], targets["verify"]),
            ]
        ),
        made_with(result),
    )


def expert_offload() -> str:
    result = read("expert_offload")
    setting = result["setting"]
    on_gpu = setting["device"] != "cpu"
    names = (
        "open_seconds",
        "first_prompt_seconds",
        "first_per_second",
        "second_per_second",
        "second_loaded",
        "own_mb",
        *(("gpu_mb",) if on_gpu else ()),
    )
    rows = [[arm, *spans(cell, *names), span_of(result["of_device"], arm)] for arm, cell in result["arms"].items()]
    return section(
        "Experts in memory or on disk until a token selects them",
        f"""A model of {setting["bytes"] / 1e9:.2f} GB in bf16, {setting["expert_bytes"] / 1e9:.2f} GB of them experts:
        each token selects {setting["num_experts_per_tok"]} of {setting["num_experts"]} in each layer. *device*:
        transformers' model, all on the device ({setting["device"]}). *cpu-N* and *disk-N*: `--experts-on` with
        `--resident-experts N`. The first answer begins with files that are on the disk only, the second may find them
        in the page cache. *Loaded*: the share of the tokens' selections for which an expert was loaded. The weights are
        noise and select experts almost evenly, which is the hardest case for a cache. Memory is the process's own,
        libraries included, without pages of mapped files.""",
        table(
            [
                "arm",
                "opened, s",
                "first prompt, s",
                "first answer, tokens/s",
                "second answer, tokens/s",
                "loaded",
                "memory, MB",
                *(["GPU memory, MB"] if on_gpu else []),
                "tokens/s / device",
            ],
            rows,
        ),
        made_with(result),
    )


def within_documents() -> str:
    names = ("within_documents", "within_documents_long", "within_documents_steps")
    *results, steps = [read(name) if (RESULTS / f"{name}.json").exists() else None for name in names]
    runs = [result for result in results if result is not None]
    named = {"bits_per_byte": "bits per byte", "perplexity": "perplexity"}
    rows = [
        [
            f"{result['setting']['documents_per_sequence']:g}",
            title,
            span(result["arms"]["across"][name]),
            span(result["arms"]["within"][name]),
            span(result["within_over_across"][name]),
        ]
        for result in runs
        for name, title in named.items()
    ]
    parts = [
        table(["documents per sequence", "held-out", "across documents", "within documents", "within / across"], rows)
    ]
    if steps is not None:
        setting = steps["setting"]
        parts.append(
            prose(
                f"""Processor seconds of a step of a sub-model, both arms in turn, with the mask that CPUs need:
                {span(steps["seconds"]["across"])} across documents, {span(steps["seconds"]["within"])} within; within /
                across {span(steps["within_over_across"])}. A step has {setting["sequences"]} sequences of
                {setting["sequence_length"]} tokens with {setting["documents_per_sequence"]} documents each."""
            )
        )
    return section(
        "Attention within documents",
        """Runs of the demo with `within_documents` in all trainings, and without, on the same text, batches and seeds.
        Held-out documents are measured by themselves in both arms.""",
        *parts,
        *map(made_with, runs),
        *([] if steps is None else [made_with(steps)]),
    )
