"""RESULTS.md from results/*.json; no number in it is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, ROOT, spread
from benchmarks.study.compare.figures import Drawing, figure_paths, plot_comparison
from benchmarks.study.grid import section as grid_section
from benchmarks.study.quality import absolutes, result_files
from benchmarks.study.quality import section as quality_section


def read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:,.2f}"


def span(values: dict[str, float]) -> str:
    return f"{number(values['median'])} ({number(values['min'])} to {number(values['max'])})"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def section(title: str, text: str, *parts: str) -> str:
    return "\n\n".join([f"## {title}", prose(text), *parts])


def prose(text: str) -> str:
    return " ".join(text.split())


def made_with(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    dirty = " with uncommitted changes" if result["dirty"] else ""
    where = f"commit {result['commit']}{dirty}, {result['date']}, {result['processor']}, {result['cores']} cores"
    return f"`{result['command']}`, {where}; {versions}; `{json.dumps(result['setting'])}`"


def training_step() -> str:
    result = read("training_step")
    rows = [[arm, span(speed)] for arm, speed in result["tokens_per_second"].items()]
    verdicts = []
    for name, target in result["targets"].items():
        verdict = "met" if result[name]["median"] >= target else "**missed**"
        verdicts.append(f"* `{name}`: {span(result[name])}, target {target}: {verdict}")
    return section(
        "A training step",
        """Steady-state tokens per second of one thread, with the same sizes, data and optimizer. *ours*: the product's loop on a
        one-expert sub-model, with its progress events. *bare*: the shortest PyTorch loop on the dense Hugging Face model of the
        same sizes. *trainer*: the Hugging Face Trainer on that model. *ours-moe* and *trainer-moe*: the product's loop and the
        Trainer on an MoE of 16 experts, with the load-balance loss.""",
        table(["arm", "tokens/s, median (min to max)"], rows), "\n".join(verdicts), made_with(result))


def kmeans() -> str:
    result = read("kmeans")
    rows = []
    for setting, cell in result["cells"].items():
        for arm, seconds in cell["seconds"].items():
            ratio = "" if arm == "ours" else span(cell[f"ours_over_{arm}"])
            counts = "yes" if cell["at_equal_inertia"][arm] else "no"
            rows.append([setting, arm, span(seconds), f"{cell['inertia_over_best'][arm]:.4f}", counts, ratio])
    return section(
        "K-means",
        f"""Seconds to cluster the same vectors on one core, all arms with the same number of restarts. Inertia is the median over
        the seeds of the rounds, relative to the best arm's. A time counts where the inertia is within
        {result["setting"]["inertia_tolerance"]:.1%} of the best. A ratio below 1 means that ours is faster.""",
        table(["setting", "arm", "seconds", "inertia / best", "counts", "ours / arm"], rows), made_with(result))


def ray_overhead() -> str:
    result = read("ray_overhead")
    seconds = result["seconds"]
    rows = [
        [stage, span(seconds["ray"][stage]), span(seconds["plain"][stage]), span(adds)]
        for stage, adds in result["ray_adds"].items()]
    return section(
        "What Ray adds to the demo",
        """Seconds per stage of `moedisco run` with the demo preset and fewer tokens: on a local Ray, and in one plain process that
        trains one sub-model after the other. *Outside stages* is the start and stop of Ray.""",
        table(["stage", "on Ray", "plain", "Ray adds"], rows), made_with(result))


def seats() -> str:
    result, targets = read("seats"), read("seats")["targets"]
    large = read("seats_256")
    rows = [
        [arm, *(span(cell[name]) for name in ("first_step", "next_step", "slowest_next_step")),
         number(result["head_mb_per_slot"][arm]), span(cell["seconds"])]
        for arm, cell in result["arms"].items()]
    many, ours = large["arms"]["seats"], result["arms"]["seats"]
    setting = large["setting"]
    verdicts = [
        at_most("seconds to the next sub-model's first step", ours["next_step"], targets["next_step"]),
        at_most("MB on the head per slot", spread([result["head_mb_per_slot"]["seats"]]), targets["head_mb_per_slot"]),
        at_most(f"MB of the head, {setting['slots']} slots", many["head_mb"], targets["head_mb"]),
        at_most(f"share of time in which a slot waits, {setting['slots']} slots", many["idle_share"], targets["idle_share"])]
    return section(
        "One-worker training of many sub-models",
        f"""Tiny sub-models on a few slots of one machine. *seats*: the product, one actor per slot that trains one sub-model after
        the other. *trainer*: a Ray Train run with one worker for each sub-model. *long-trainer*: one Ray Train run per slot with a
        fixed list. Seconds from the end of a sub-model's last step to the first step of the next one on that slot, and memory of
        Ray's processes and the driver for each additional slot; workers do not count, because they are on other machines.
        {setting["jobs"]} sub-models on {setting["slots"]} slots of this machine took {number(many["seconds"]["median"])} s, the
        start of {setting["slots"]} processes included; Ray and the driver held {number(many["head_mb"]["median"])} MB.""",
        table(["arm", "first step, s", "next step, s", "slowest next step, s", "MB per slot", "whole, s"], rows),
        "\n".join(verdicts), made_with(result), made_with(large))


def service_load() -> str:
    result = read("service_load")
    setting, targets, readers, report = result["setting"], result["targets"], result["readers"], result["report"]
    asked = {"none": result["requests"], f"{setting['readers']:,}": readers["requests"]}
    requests = [
        [f"a page of {setting['page']}" if kind == "page" else "one run", streams, concurrency, *map(span, cell.values())]
        for streams, kinds in asked.items() for kind, cells in kinds.items() for concurrency, cell in cells.items()]
    delivery = [
        [when, span(readers[cell]["p50_ms"]), span(readers[cell]["p99_ms"])]
        for when, cell in {"no requests": "delivery", "the requests above": "delivery_busy"}.items()]
    points = {"over HTTP, one driver": "one driver", "over HTTP, four drivers": "four drivers", "`database.ingest`": "direct"}
    single, late, share = result["requests"]["run"]["8"]["per_second"], readers["delivery"]["p99_ms"], result["others_share"]
    verdicts = [
        at_least("metric points per second, over HTTP", report["one driver"], targets["points_per_second"]),
        at_least("metric points per second, directly", report["direct"], targets["points_per_second"]),
        at_least("requests per second for one run, over 8 connections", single, targets["runs_get_per_second"]),
        at_most("delivery of an event to its readers, p99 in ms", late, targets["delivery_p99_ms"])]
    return section(
        "The service under load",
        f"""`moedisco serve`, one process on SQLite, with {setting["runs"]:,} runs in its database. The clients are another process
        on the same machine. Half of the {setting["readers"]:,} event streams follow one run, whose driver makes
        {setting["reports_per_second"]} reports of {setting["events_per_report"]} events per second. The delivery time of an event
        is measured from the beginning of its report until a reader has it; every reader receives every event. Metric points come
        in reports of {setting["events_per_batch"]:,} progress events with {setting["points_per_event"]} points each. Median (min
        to max) over {setting["rounds"]} rounds, each with a fresh service. Other work used {share["median"]:.0%}
        ({share["min"]:.0%} to {share["max"]:.0%}) of the machine.""",
        table(["GET", "event streams", "connections", "requests/s", "p50, ms", "p99, ms"], requests),
        table(["events to readers, at the same time", "p50, ms", "p99, ms"], delivery),
        table(["ingest", "metric points/s"], [[how, span(report[cell])] for how, cell in points.items()]),
        table(["memory of the service", "MiB"], [[when, span(size)] for when, size in result["memory_mib"].items()]),
        "\n".join(verdicts), made_with(result))


def checkpoint_stall() -> str:
    result = read("checkpoint_stall")
    arms, target = result["arms"], result["targets"]["stalled"]
    names = {
        "disk": "disk, in the background", "disk-waits": "disk, waiting", "s3": "S3, in the background",
        "s3-waits": "S3, waiting"}
    rows = [[names[arm], *(span(cell[name]) for name in ("stalled", "slower", "stall", "latency", "interval"))]
            for arm, cell in arms.items()]
    verdicts = [at_most(f"share of stalls, {names[arm]}", arms[arm]["stalled"], target) for arm in ("disk", "s3")]
    return section(
        "Checkpoints",
        """The share of the time for which training stops to save weights and optimizer state, and how much longer its steps take
        than without checkpoints. *In the background*: the product, which copies them in memory while a thread writes. *Waiting*:
        training continues when the checkpoint is safe. S3 is a server on the same machine and shares its cores. Stalls are
        measured within one training. *Slower by* compares two trainings; other work on the machine can give it either sign.
        The policy's intervals are at least 15 s.""",
        table(["arm", "share of stalls", "slower by", "stall, s", "safe after, s", "interval, s"], rows),
        "\n".join(verdicts), made_with(result))


def corpus_scale() -> str:
    result = read("corpus_scale")
    setting, targets = result["setting"], result["targets"]
    assignment = [
        [f"{cell['documents']:,}", *(number(cell[name]) for name in ("driver_peak_mb", "task_peak_mb", "load_passes")),
         f"{cell['largest_over_mean']:.4f}",
         *(number(cell[name]) for name in ("kmeans_seconds", "fit_seconds", "assign_seconds"))]
        for cell in result["assignment"]]
    corpus = [
        [f"{int(size):,}", *(span(cell["mb_per_core_second"][arm]) for arm in ("stage", "bare")), span(cell["stage_over_bare"]),
         number(cell["peak_mb"])]
        for size, cell in result["corpus"].items()]
    verdicts = [
        at_most("driver's peak memory in MB, most documents", spread([result["assignment"][-1]["driver_peak_mb"]]),
                targets["driver_peak_mb"]),
        at_most("peak of the corpus stage in MB, driver and tasks in one process, most text",
                spread([max(result["corpus"].items(), key=lambda item: int(item[0]))[1]["peak_mb"]]), targets["driver_peak_mb"]),
        *(at_least(f"stage / bare, {size} MB", cell["stage_over_bare"], targets["stage_over_bare"])
          for size, cell in result["corpus"].items())]
    return section(
        "Corpus and clusters as the text grows",
        f"""Synthetic documents with vectors of {setting["dimensions"]} dimensions in files, in {setting["clusters"]} clusters with
        a capacity of {setting["capacity"]} times the mean: the driver fits k-means and prices on samples, and tasks in
        {setting["workers"]} processes add up the loads and assign the documents. Peaks include about 400 MB of libraries.
        The corpus stage, from JSON Lines to packed tokens in one process, is compared with `tokenizers` alone in MB of text per
        second of processor time.""",
        table(
            ["documents", "driver, MB", "largest task, MB", "passes", "largest / mean", "k-means, s", "balance, s", "assign, s"],
            assignment),
        table(["MB of text", "stage, MB/s", "bare, MB/s", "stage / bare", "peak of the stage, MB"], corpus),
        "\n".join(verdicts), made_with(result))


def true_sizes() -> str:
    result = read("true_sizes")
    setting, targets = result["setting"], result["targets"]
    rows = [
        [arm, span(result["seconds"][arm]), span(result["own_mb"][arm]),
         *(span(result[key][arm]) if arm in result[key] else "" for key in ("mb_per_second", "of_copy", "check_seconds"))]
        for arm in result["seconds"]]
    verdicts = [
        *(at_most(f"memory of {arm} in MB", result["own_mb"][arm], targets["own_mb"])
          for arm in ("merge", "evaluate", "export", "published")),
        *(at_least(f"{name} / copy", result["of_copy"][name], targets["of_copy"])
          for name in ("join", "export without its check"))]
    return section(
        "Merge, evaluation and export of a model that is larger than their memory",
        f"""An MoE of {setting["gigabytes"]:g} GB in bf16, merged from {setting["submodels"]} sub-models with backbones that differ,
        on one core without a GPU. Memory is the process's own, about 350 MB of libraries included, without pages of mapped files.
        Inputs come from the disk, and outputs are on the disk when the clock stops. *copy*: copies the merged model's files.
        *join*: joins the sub-models and writes the MoE. *merge*: the same with routers calibrated on
        {setting["calibration_tokens"]} tokens. *evaluate*: {setting["evaluated_tokens"]} tokens in fp32. *export*: writes the model
        in another dtype of the same size and compares it with the trained one. *published*: links the files and compares.""",
        table(["arm", "seconds", "memory, MB", "MB/s written", "/ copy", "seconds of the comparison"], rows),
        "\n".join(verdicts), made_with(result))


def simulator() -> str:
    result = read("simulator")
    setting, rates = result["setting"], result["loss_rates"]
    prior, bounds = result["defaults"]["prior"], result["defaults"]["bounds"]
    arms = list(result["interval"]["no losses"])
    over = "dollars_over_bound"
    intervals = [
        [f"{name}: {rates[name]:g}", *(f"{cells[arm][over]['median']:.3f}" for arm in arms)]
        for name, cells in result["interval"].items()]
    orders = [
        [f"{int(machines):,}", *(span(cells[name]["makespan_over_bound"]) for name in ("longest_first", "as_given"))]
        for machines, cells in result["order"].items()]
    priors = [[name, *(f"{cell[over]['median']:.4f}" for cell in cells.values())] for name, cells in result["assumption"].items()]
    arrivals = [
        [name, ask.replace("_", " "), span(cell["idle_dollars"]), span(cell["late_seconds"])]
        for name, cells in result["arrival"].items() for ask, cell in cells.items()]
    mixed = [[name, span(cell["dollars"]), span(cell["hours"])] for name, cell in result["mixed"].items()]
    return section(
        "Spot machines, simulated",
        f"""{setting["submodels"]} sub-models of unequal size, {setting["mean_hours"]:g} hours in the mean, on a market of
        {setting["gpus"]:,} spot GPUs. The simulator calls the product's own policy functions.
        `benchmarks/study/simulation/setting.py`
        names the sources of loss rates and boot times: 7e-5 and 3.1e-4 losses per machine-hour are bands of the AWS Spot Instance
        Advisor, 0.06 to 0.74 come from published traces of V100 machines. The bounds know the future: max(longest, sum / machines)
        for time, and all work on machines that never boot, save or are lost for dollars. Median (min to max) over
        {setting["seeds"]} seeds. *Ours* sets the checkpoint interval from the losses seen so far. *Notices heard* has
        `moedisco node-agent` on every machine. *Zones at once* loses half a zone at a time. The defaults that follow: a pool is
        assumed to lose {prior["per_hour"]:g} machines per machine-hour, with the weight of {prior["hours"]:g} hours of observation;
        intervals are {bounds["shortest"]:g} to {bounds["longest"]:,g} s, with stalls under {bounds["stall"]:.0%}; the longest
        sub-model starts first; nodes of the fine-tune are requested one boot time before the predicted end.""",
        "![Order, checkpoint interval, arrival](results/simulator.png)",
        table(["dollars / bound, at losses per machine-hour", *arms], intervals),
        table(["machines held at once", "makespan / bound, longest first", "as given"], orders),
        table(["dollars / bound, with the assumption", *result["assumption"]["traces, median"]], priors),
        table(["losses", "expensive nodes requested", "dollars while they wait", "seconds that the run waits"], arrivals),
        table(["node types", "dollars, a fifth of the sub-models being large", "hours"], mixed), made_with(result))


def makespan() -> str:
    result = read("makespan")
    setting, targets = result["setting"], result["targets"]
    cells = [
        (nodes, losses, cell) for nodes, measured in sorted(result["cells"].items()) for losses, cell in measured.items()]
    rows = [
        [nodes, losses, str(cell["losses"]), number(cell["makespan"]), number(cell["start"]), f"{cell['over_bound']:.3f}",
         f"{cell['over_bound_with_starts']:.3f}", f"{targets[losses]:.2f}",
         "met" if cell["over_bound"] <= targets[losses] else "**missed**"]
        for nodes, losses, cell in cells]
    arrivals = [
        f"* from a node's arrival to the end of its trainer's first step, {nodes} node(s): {span(cell['arrival'])} s"
        for nodes, _, cell in cells if "arrival" in cell]
    shares, mean = setting["shares"], setting["mean_seconds"]
    made = [f"* {nodes} node(s): {made_with({**made, 'setting': setting})}" for nodes, made in sorted(result["made"].items())]
    return section(
        "Makespan on machines that come and go",
        f"""{len(shares)} sub-models of {min(shares):g} to {max(shares):g} times their mean length, which is {mean:g} s per node of
        the
        cluster. Each node has room for one sub-model; every node is a raylet on one machine, with one or two clusters at once, as
        the command says. A step waits {setting["pace"]:g} s, as for a GPU, so that nodes that share the machine's cores do not
        slow each other. Everything else is real: Ray Train's starts, checkpoints every {setting["interval_steps"]} steps, SIGKILL
        to raylets. With losses, a node lives {setting["intervals_per_loss"]} checkpoint intervals on average, and its replacement
        starts at once. The bound is max(longest, sum / nodes) of the steps alone; targets are compared with it. Sub-models that
        last hours hide the start of their trainer. These do not, so the second ratio counts one undisturbed start (the measured
        median) as part of each sub-model. Starts after losses count in full in both.""",
        table(["nodes", "losses", "nodes lost", "makespan, s", "a start, s", "/ bound", "/ bound with starts", "target", ""], rows),
        "\n".join(arrivals), "\n".join(made))


def quality() -> str:
    results = quality_section.results()
    figures = [path for folder in drawings() for path in figure_paths(folder)]
    return section(
        "Quality for money",
        f"""Held-out perplexity relative to joint training of the same MoE on the high-memory pool, and the planned dollars for
        which complete runs reach its final loss, relative to joint training's dollars. {quality_section.joint_tokens()} tokens of
        joint training; one tokenizer and one validation text per cell. Median over seeds (smallest to largest). Prices are the
        paper's; the speed of the cheap card is assumed to be 0.72 of the other's.""",
        prose("""Dollars and hours are operations at these prices and speeds, of everything that an arm pays for: its training,
        the passes over the corpus for its clusters, those that calibrate its routers and compare its merges, and the evaluation
        of its own final model. Not counted: evaluations of the held-out loss during training, and text of other sources (the
        domains of the other corpus), which only the benchmark asks for. Also not counted: communication between the workers of a
        gang, which favours arms that shard a model over cheap cards, and the data that sync points move through storage, which
        favours the default. Metered dollars are the seconds for which workers were held, all of that included; each worker is a
        process with one thread, next to another one."""),
        prose("""At equal dollars, an arm's figure is interpolated between two of its complete runs, on a straight line of log
        perplexity (or hours) over log dollars, at joint training's dollars. Equal hours work the same way: the hours of one worker
        of the high-memory pool, and of one low-memory worker per sub-model. Figures of a gang on the low-memory pool are those of
        the same training at that pool's price."""),
        prose("""Batch sizes and learning rates: joint training, sparse upcycling and the default each have the best ones on seeds
        that are not among these (the latter two measured on `qwen3_moe`). The paper's recipe has those of the default; other rates
        gave the same results. *What was tried* lists them. From random weights the paper's recipe clusters by an untrained
        embedding table, where the paper has a trained one. A common dense start was trained on 250,000 tokens, which no arm pays
        for. The default with 40 % of the tokens in the fine-tune has joint training's batch size and learning rate there, half of
        the tokens in the seed, and runs at equal tokens only: it is meant for limited text, not for a limited budget."""),
        prose("""Corpora: `corpora.py debian` builds `debian8` from Debian packages: kernel and Perl documentation, Python and C++
        code, office help in French and Chinese, a political FAQ, a dictionary. `corpora.py cut` cut `small8` from texts that are
        not in this repository: Go code, Metamath proofs, the PHP manual, office help in German and Japanese, novels, speeches,
        film reviews. No domain is in both; each is the other's text of other sources."""),
        table(quality_section.HEAD, quality_section.rows()), "\n".join(quality_section.verdicts()),
        *(f"![{path.parent.name}, {path.stem}]({path.relative_to(ROOT)})" for path in figures),
        "### Absolute figures",
        prose("""At equal tokens, medians over the seeds. The last columns compare sources and clusters of documents with the expert
        that is most often the first choice in them: normalised mutual information, 1 where one determines the other, mean over
        the layers."""),
        table(absolutes.HEAD, absolutes.rows(results)),
        "By domain, medians over families, starts and seeds.", table(absolutes.DOMAINS_HEAD, absolutes.domains(results)),
        "### At other prices",
        prose("""Complete runs as above, whose lengths were chosen for the paper's prices. Median of the cells' medians (smallest to
        largest cell)."""),
        table(quality_section.PRICES_HEAD, quality_section.prices()),
        "### One lever at a time",
        prose("""The default with one setting changed back to the paper's, or to another method's, at equal tokens. Seeds differ by
        more
        than most levers do, but a lever shares text, start and batch order with the default's run of the same seed. So read the
        last column, and whether all its seeds are on one side of 1."""),
        table(quality_section.LEVERS_HEAD, quality_section.levers()),
        "### What was tried", "Notes from `benchmarks/study/quality/tried.json`, on one seed: small differences mean little.",
        table(quality_section.TRIED_HEAD, quality_section.tried()), quality_section.made_with())


def grid() -> str:
    tables = [
        part for title, rows in grid_section.tables(grid_section.entries()).items()
        for part in (f"**{title}**", table(grid_section.HEAD, rows))]
    return section(
        "Where MoEs are sparse",
        """The gap is the held-out loss at equal tokens minus joint training's, in nats per token; below 0 is better than joint
        training. Its slope is the change of the gap for four times the tokens. Dollars are those until an arm reaches joint
        training's loss, joint training on the large card being 1, at three price books: the dollars for the same tokens times
        exp(gap / slope of joint training's loss over the log of the tokens). A dash means that one budget was measured, from which
        no slope follows; the dollars for the same tokens are next to them. Hours are those for the same tokens, with one cheap card
        per sub-model. Communication between the cards is not counted, which favours joint training on the cheap pool. *Ours* trains
        its seed on all cheap cards, which synchronise; *seed on one card* does not. The rivals' seeds are on one card. Where arms
        are tuned, it is on another corpus and seed than they are reported on; else a table says so.""",
        *tables, f"Prices: {grid_section.prices()}.", grid_section.made_with())


def drawings() -> dict[Path, Drawing]:
    """The figures of the quality benchmark, by folder."""
    published = result_files.PUBLISHED
    return {
        published / each.name.replace("/", "-"): each for each in result_files.read_lines(published / result_files.CURVES, Drawing)}


def ranking() -> str:
    result = read("ranking")
    arms = result["setting"]["arms"][1:]
    rows = [
        [str(seed), how, ", ".join(found["ranking"]), *(f"{found['over_joint'][arm]:+.3f}" for arm in arms)]
        for seed, each in enumerate(result["seeds"]) for how, found in each.items()]
    return section(
        "Does `python -m benchmarks.study compare` rank as the tuned benchmark does?",
        """On the domains of the embedded corpus, for which no recipe was tuned. Every arm runs at the default's batch size and
        learning rate (*as configured*), tuned by `compare`, and with the batch sizes and rates that the benchmark's baselines were
        tuned to. Held-out nats per token above joint training's, at equal tokens. Small differences between arms are within the
        noise of one seed.""",
        table(["seed", "tuned", "best first", *arms], rows), made_with(result))


def at_least(what: str, measured: dict[str, float], target: float) -> str:
    return f"* {what}: {span(measured)}, target {number(target)}: {'met' if measured['median'] >= target else '**missed**'}"


def at_most(what: str, measured: dict[str, float], target: float) -> str:
    return f"* {what}: {span(measured)}, at most {number(target)}: {'met' if measured['median'] <= target else '**missed**'}"


_INTRODUCTION = """The machines that measured these are noisy: read ratios and medians, not single figures. Arms take turns, and
        each
is a whole process. `python -m benchmarks.document` writes this page from `benchmarks/results/`; `make bench` measures again."""


def page() -> str:
    """The text of RESULTS.md."""
    measured = {
        "training_step": training_step, "kmeans": kmeans, "ray_overhead": ray_overhead, "seats_256": seats,
        "service_load": service_load, "checkpoint_stall": checkpoint_stall, "simulator": simulator, "makespan": makespan,
        "corpus_scale": corpus_scale, "true_sizes": true_sizes, "ranking": ranking}
    parts = ["# Results", " ".join(_INTRODUCTION.split()), *(
        write() for name, write in measured.items() if (RESULTS / f"{name}.json").exists())]
    if grid_section.entries():     # hours of measuring, apart from `make bench`
        parts.append(grid())
    if quality_section.results():     # the same
        parts.append(quality())
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    for folder, drawn in drawings().items():
        plot_comparison(drawn, folder)
    (ROOT / "RESULTS.md").write_text(page(), encoding="utf-8")
