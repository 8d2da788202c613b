"""RESULTS.md from results/*.json; no number in it is typed by hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.corpus_sections import corpus_blocks, corpus_engines, corpus_scale
from benchmarks.harness import RESULTS, ROOT
from benchmarks.members_section import members
from benchmarks.memory_sections import fake_memory, true_sizes
from benchmarks.page_parts import made_with, number, read, section, span, table
from benchmarks.speed_sections import (
    checkpoint_stall,
    expert_offload,
    ray_overhead,
    seats,
    service_load,
    service_tabs,
    training_step,
    verification,
    within_documents,
)
from benchmarks.streaming_sections import streamed_cards, streamed_host, streamed_timeline
from benchmarks.study.grid import section as grid_section
from benchmarks.study.grid.picture import write_picture


def simulator() -> str:
    result = read("simulator")
    setting, rates = result["setting"], result["loss_rates"]
    prior, bounds = result["defaults"]["prior"], result["defaults"]["bounds"]
    arms = list(result["interval"]["no losses"])
    intervals = [
        [f"{name}: {rates[name]:g}", *_dollars_over_bound(cells, arms, 3)] for name, cells in result["interval"].items()
    ]
    over = "makespan_over_bound"
    orders = [
        [f"{int(machines):,}", span(cells["longest_first"][over]), span(cells["as_given"][over])]
        for machines, cells in result["order"].items()
    ]
    priors = [[name, *_dollars_over_bound(cells, cells, 4)] for name, cells in result["assumption"].items()]
    arrivals = [
        [name, ask.replace("_", " "), span(cell["idle_dollars"]), span(cell["late_seconds"])]
        for name, cells in result["arrival"].items()
        for ask, cell in cells.items()
    ]
    mixed = [[name, span(cell["dollars"]), span(cell["hours"])] for name, cell in result["mixed"].items()]
    return section(
        "Spot machines, simulated",
        f"""{setting["submodels"]} sub-models of unequal size, {setting["mean_hours"]:g} hours in the mean, on a market
        of {setting["gpus"]:,} spot GPUs. The simulator calls the product's own policy functions.
        `benchmarks/study/simulation/setting.py` names the sources of loss rates and boot times: 7e-5 and 3.1e-4 losses
        per machine-hour are bands of the AWS Spot Instance Advisor, 0.06 to 0.74 come from published traces of V100
        machines. The bounds know the future: max(longest, sum / machines) for time, and all work on machines that never
        boot, save or are lost for dollars. Median (min to max) over {setting["seeds"]} seeds. *Ours* sets the
        checkpoint interval from the losses seen so far. *Notices heard* has `moedisco node-agent` on every machine.
        *Zones at once* loses half a zone at a time. The defaults that follow: a pool is assumed to lose
        {prior["per_hour"]:g} machines per machine-hour, with the weight of {prior["hours"]:g} hours of observation;
        intervals are {bounds["shortest"]:g} to {bounds["longest"]:,g} s, with stalls under {bounds["stall"]:.0%}; the
        longest sub-model starts first; nodes of the fine-tune are requested one boot time before the predicted end.""",
        "![Order, checkpoint interval, arrival](results/simulator.png)",
        table(["dollars / bound, at losses per machine-hour", *arms], intervals),
        table(["machines held at once", "makespan / bound, longest first", "as given"], orders),
        table(["dollars / bound, with the assumption", *result["assumption"]["traces, median"]], priors),
        table(
            ["losses", "expensive nodes requested", "dollars while they wait", "seconds that the run waits"], arrivals
        ),
        table(["node types", "dollars, a fifth of the sub-models being large", "hours"], mixed),
        made_with(result),
    )


def _dollars_over_bound(cells: dict[str, Any], names: Iterable[str], digits: int) -> list[str]:
    return [f"{cells[name]['dollars_over_bound']['median']:.{digits}f}" for name in names]


def makespan() -> str:
    result = read("makespan")
    setting, targets = result["setting"], result["targets"]
    cells = [
        (nodes, losses, cell)
        for nodes, measured in sorted(result["cells"].items())
        for losses, cell in measured.items()
    ]
    rows = [
        [
            nodes,
            losses,
            str(cell["losses"]),
            number(cell["makespan"]),
            number(cell["start"]),
            f"{cell['over_bound']:.3f}",
            f"{cell['over_bound_with_starts']:.3f}",
            f"{targets[losses]:.2f}",
            "met" if cell["over_bound"] <= targets[losses] else "**missed**",
        ]
        for nodes, losses, cell in cells
    ]
    arrivals = [
        f"* from a node's arrival to the end of its trainer's first step, {nodes} node(s): {span(cell['arrival'])} s"
        for nodes, _, cell in cells
        if "arrival" in cell
    ]
    shares, mean = setting["shares"], setting["mean_seconds"]
    made = [
        f"* {nodes} node(s): {made_with({**made, 'setting': setting})}"
        for nodes, made in sorted(result["made"].items())
    ]
    return section(
        "Makespan on machines that come and go",
        f"""{len(shares)} sub-models of {min(shares):g} to {max(shares):g} times their mean length, which is {mean:g} s
        per node of the cluster. Each node has room for one sub-model; every node is a raylet on one machine, with one
        or two clusters at once, as the command says. A step waits {setting["pace"]:g} s, as for a GPU, so that nodes
        that share the machine's cores do not slow each other. Everything else is real: Ray Train's starts, checkpoints
        every {setting["interval_steps"]} steps, SIGKILL to raylets. With losses, a node lives
        {setting["intervals_per_loss"]} checkpoint intervals on average, and its replacement starts at once. The bound
        is max(longest, sum / nodes) of the steps alone; targets are compared with it. Sub-models that last hours hide
        the start of their trainer. These do not, so the second ratio counts one undisturbed start (the measured median)
        as part of each sub-model. Starts after losses count in full in both.""",
        table(
            [
                "nodes",
                "losses",
                "nodes lost",
                "makespan, s",
                "a start, s",
                "/ bound",
                "/ bound with starts",
                "target",
                "",
            ],
            rows,
        ),
        "\n".join(arrivals),
        "\n".join(made),
    )


_COLUMNS = (
    """*gap*: the loss at equal tokens minus joint training's, in nats per token; below 0 is better. *Its slope*: the
    change of the gap for four times the tokens, over the seeds that both budgets share.""",
    """*dollars*: what an arm pays until its loss is joint training's, at three price books; joint training on the large
    card is 1. They are the dollars for *equal tokens* times exp(gap / slope), where the slope is that of joint
    training's loss over the log of the tokens. A dash: one budget was measured, which has no slope, or more than four
    times the tokens would be needed.""",
    """*hours, paper*: for the same tokens, at the paper's speeds, with one cheap card per sub-model against one large
    card. With Muon all cheap cards train a seed together and exchange gradients in every step, which takes no time
    here; this favours these arms, and joint training on the cheap pool. With AdamW, which is older, one card trains the
    seed.""",
    """*perplexity on other text*: on a corpus that is not trained on, relative to joint training's. A dash: not
    measured with every seed.""",
)


def grid() -> str:
    tables = [
        part
        for title, rows in grid_section.tables(grid_section.entries()).items()
        for part in (f"**{title}**", table(grid_section.HEAD, rows))
    ]
    return section(
        "Where MoEs are sparse",
        """Held-out figures of each arm, in cells of one corpus, model family, start, number of experts and budget of
        tokens. Rows are explained in docs/results.md; those that change one setting are levers
        (`benchmarks/study/grid/levers.py`). Where arms are tuned, it is on another corpus and seed than they are
        reported on; else the title or the row says so.""",
        "\n".join(f"* {' '.join(text.split())}" for text in _COLUMNS),
        *tables,
        f"Prices: {grid_section.prices()}.",
        *filter(None, [grid_section.earlier_clustering()]),
        grid_section.made_with(),
    )


_INTRODUCTION = """The machines that measured these are noisy: read ratios and medians, not single figures. Arms take
turns, and each is a whole process. `python -m benchmarks.document` writes this page from `benchmarks/results/`, which
`make bench` measures again, and its last section from the grid's results (`python -m benchmarks.study grid`)."""


def page() -> str:
    """The text of RESULTS.md."""
    measured = {
        "training_step": training_step,
        "ray_overhead": ray_overhead,
        "seats_256": seats,
        "service_load": service_load,
        "service_tabs": service_tabs,
        "checkpoint_stall": checkpoint_stall,
        "verification": verification,
        "simulator": simulator,
        "makespan": makespan,
        "corpus_scale": corpus_scale,
        "corpus_engines": corpus_engines,
        "corpus_blocks": corpus_blocks,
        "true_sizes": true_sizes,
        "expert_offload": expert_offload,
        "within_documents": within_documents,
        "fake_memory": fake_memory,
        "streamed_timeline": streamed_timeline,
        "streamed_host": streamed_host,
        "streamed_cards": streamed_cards,
        "members": members,
    }
    parts = [
        "# Results",
        " ".join(_INTRODUCTION.split()),
        *(write() for name, write in measured.items() if (RESULTS / f"{name}.json").exists()),
    ]
    if grid_section.entries():  # hours of measuring, apart from `make bench`
        parts.append(grid())
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (ROOT / "RESULTS.md").write_text(page(), encoding="utf-8")
    write_picture(ROOT.parent / "docs" / "images" / "ways.png")
