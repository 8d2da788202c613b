"""RESULTS.md from results/*.json; no number in it is typed by hand."""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness import RESULTS, ROOT
from benchmarks.speed_sections import (
    checkpoint_stall,
    corpus_scale,
    expert_offload,
    kmeans,
    made_with,
    number,
    prose,
    ray_overhead,
    read,
    seats,
    section,
    service_load,
    span,
    table,
    training_step,
    true_sizes,
    within_documents,
)
from benchmarks.study.compare.figures import Drawing, figure_paths, plot_comparison
from benchmarks.study.grid import section as grid_section
from benchmarks.study.quality import absolutes, result_files
from benchmarks.study.quality import section as quality_section


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
        exp(gap / slope of joint training's loss over the log of the tokens). A dash means that one budget was measured, from
        which no slope follows, or that more than four times the tokens would be needed; the dollars for the same tokens are
        next to them. Both slopes compare the seeds that two budgets share. Hours are those for the same tokens, with one cheap
        card per sub-model. Communication between the cards is not counted, which favours joint training on the cheap pool, and
        arms whose seed all cards train together with exact gradients, as all with Muon do. Those with AdamW are older: there
        one card trains the seed. With *seed on all cards*, members average their weights at syncs and exchange no gradients.
        Where arms are tuned, it is on another corpus and seed than they are reported on; else a table or its row says so.""",
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


_INTRODUCTION = """The machines that measured these are noisy: read ratios and medians, not single figures. Arms take turns, and
        each
is a whole process. `python -m benchmarks.document` writes this page from `benchmarks/results/`; `make bench` measures again."""


def page() -> str:
    """The text of RESULTS.md."""
    measured = {
        "training_step": training_step, "kmeans": kmeans, "ray_overhead": ray_overhead, "seats_256": seats,
        "service_load": service_load, "checkpoint_stall": checkpoint_stall, "simulator": simulator, "makespan": makespan,
        "corpus_scale": corpus_scale, "true_sizes": true_sizes,
        "expert_offload": expert_offload, "within_documents": within_documents, "ranking": ranking}
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
