"""Simulates sub-models on spot machines, event by event, with the product's own policies (`moedisco_ray.policies`).

256 unequal sub-models run on 1,000 spot GPUs, with published loss rates and boot times (sources in
`simulation/setting.py`). They are compared with lower bounds for any schedule: none ends before max(longest, sum /
machines), and none costs less than all work on the cheapest machine without boots, checkpoints or losses. Five
questions:

order       whether starting the longest sub-models first pays, and at which number of machines
interval    whether the product's checkpoint interval is as good as fixed ones at every loss rate
assumption  which loss rate the product should assume before it has seen a loss
arrival     the cost of expensive nodes requested too early, too late, and just in time
mixed       the saving if each sub-model goes to the cheapest machine with enough memory

Writes results/simulator.json and results/simulator.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from matplotlib.figure import Figure

from benchmarks.harness import RESULTS, environment, spread, write_result
from benchmarks.study.simulation.phase import Phase
from benchmarks.study.simulation.setting import HOUR, LOSS_RATES, Kind, Setting
from benchmarks.study.simulation.state import Outcome
from moedisco_ray.policies import arrival
from moedisco_ray.policies.checkpointing import ASSUMED, USUAL, Prior

MACHINES = (32, 64, 128, 256, 1000)
INTERVALS = (60.0, 300.0, 900.0, 1800.0)
PRIORS = {
    "0.01/h for 10 h": Prior(0.01, 10),
    "0.1/h for 10 h": Prior(0.1, 10),
    "1/h for 10 h": Prior(1, 10),
    "0.1/h for 1 h": Prior(0.1, 1),
    "0.1/h for 1,000 h": Prior(0.1, 1000),
}
USUAL_RATE = "traces, median"
BOTH = (Kind("24gb", 24.0, 0.35, 1.0, 800), Kind("48gb", 48.0, 0.80, 1.2, 200))
LARGE_SHARE = 0.2

Cell = dict[str, dict[str, float]]


class Runs:
    """Simulates settings with every seed, and caches the results of each setting."""

    def __init__(self, seeds: int) -> None:
        self._seeds = range(seeds)
        self._known: dict[Setting, list[Outcome]] = {}

    def __call__(self, **changes: Any) -> list[Outcome]:
        setting = Setting(**changes)
        if setting not in self._known:
            print(changes, file=sys.stderr)
            self._known[setting] = [Phase(setting, seed).run() for seed in self._seeds]
        return self._known[setting]

    def makespan(self, **changes: Any) -> Cell:
        """Makespan relative to its lower bound."""
        return {"makespan_over_bound": spread([outcome.makespan / outcome.bound for outcome in self(**changes)])}

    def dollars(self, **changes: Any) -> Cell:
        """Dollars relative to their lower bound."""
        return {"dollars_over_bound": spread([each.dollars / each.bound_dollars for each in self(**changes)])}


def order(runs: Runs) -> dict[str, dict[str, Cell]]:
    def both(machines: int) -> dict[str, Cell]:
        return {
            name: runs.makespan(at_once=machines, order=name, losses_per_hour=LOSS_RATES[USUAL_RATE])
            for name in ("longest_first", "as_given")
        }

    return {str(machines): both(machines) for machines in MACHINES}


def interval(runs: Runs) -> dict[str, dict[str, Cell]]:
    def every_interval(rate: float) -> dict[str, Cell]:
        return {
            "ours": runs.dollars(losses_per_hour=rate),
            **{f"{every:.0f} s": runs.dollars(losses_per_hour=rate, every=every) for every in INTERVALS},
            "ours, notices heard": runs.dollars(losses_per_hour=rate, heard=1.0),
            "ours, zones at once": runs.dollars(losses_per_hour=rate, together=0.5),
        }

    return {name: every_interval(rate) for name, rate in LOSS_RATES.items()}


def assumption(runs: Runs) -> dict[str, dict[str, Cell]]:
    def every_prior(rate: float) -> dict[str, Cell]:
        return {label: runs.dollars(losses_per_hour=rate, prior=prior) for label, prior in PRIORS.items()}

    return {name: every_prior(LOSS_RATES[name]) for name in ("Advisor, 5 % a month", USUAL_RATE)}


def expensive(runs: Runs) -> dict[str, dict[str, Cell]]:
    cells: dict[str, dict[str, Cell]] = {}
    for name in ("no losses", USUAL_RATE):
        cells[name] = {}
        for ask in ("at_start", "in_time", "at_end"):
            outcomes = runs(losses_per_hour=LOSS_RATES[name], ask=ask)
            cells[name][ask] = {
                "idle_dollars": spread([outcome.idle_dollars for outcome in outcomes]),
                "late_seconds": spread([outcome.late for outcome in outcomes]),
            }
    return cells


def mixed(runs: Runs) -> dict[str, Cell]:
    cells = {}
    for name, kinds in (("both types", BOTH), ("large alone", BOTH[1:])):
        outcomes = runs(losses_per_hour=LOSS_RATES[USUAL_RATE], kinds=kinds, large_share=LARGE_SHARE)
        cells[name] = {
            "dollars": spread([outcome.dollars for outcome in outcomes]),
            "hours": spread([outcome.makespan / HOUR for outcome in outcomes]),
        }
    return cells


def plot(result: dict[str, Any]) -> None:
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name, marker in (("longest_first", "o"), ("as_given", "s")):
        values = [result["order"][str(machines)][name]["makespan_over_bound"] for machines in MACHINES]
        left.errorbar(
            MACHINES,
            [value["median"] for value in values],
            yerr=_whiskers(values),
            marker=marker,
            capsize=3,
            label=name.replace("_", " "),
        )
    left.set(
        xscale="log",
        xlabel="machines held at once",
        ylabel="makespan / bound",
        title="Order, 0.44 losses per machine-hour",
    )
    left.set_xticks(MACHINES, [f"{machines:,}" for machines in MACHINES])
    left.minorticks_off()
    left.legend()
    rates = list(LOSS_RATES)
    for arm in result["interval"][rates[0]]:
        values = [result["interval"][rate][arm]["dollars_over_bound"] for rate in rates]
        middle.errorbar(
            range(len(rates)),
            [value["median"] for value in values],
            yerr=_whiskers(values),
            marker=".",
            capsize=2,
            label=arm,
            linewidth=2.5 if arm == "ours" else 1,
        )
    middle.set(ylabel="dollars / bound", title="Checkpoint interval")
    middle.set_xticks(range(len(rates)), [f"{LOSS_RATES[rate]:g}" for rate in rates])
    middle.set_xlabel("losses per machine-hour")
    middle.legend(fontsize="small")
    asks = result["arrival"][USUAL_RATE]
    for ask, cell in asks.items():
        right.scatter(cell["late_seconds"]["median"], max(cell["idle_dollars"]["median"], 0.01), s=80)
        right.annotate(
            f"  {ask.replace('_', ' ')}", (cell["late_seconds"]["median"], max(cell["idle_dollars"]["median"], 0.01))
        )
    right.set(
        yscale="log",
        xlabel="seconds that the run waits",
        ylabel="dollars paid for waiting nodes",
        title="When 8 expensive nodes are asked for",
    )
    right.margins(x=0.3)
    right.set_xlim(left=-20)
    figure.savefig(RESULTS / "simulator.png", dpi=110)


def _whiskers(values: list[dict[str, float]]) -> list[list[float]]:
    return [[value["median"] - value["min"] for value in values], [value["max"] - value["median"] for value in values]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8)
    arguments = parser.parse_args()
    runs = Runs(arguments.seeds)
    usual = Setting()
    result = {
        **environment("python -m benchmarks.study.simulation"),
        "setting": {
            "seeds": arguments.seeds,
            "submodels": usual.submodels,
            "mean_hours": usual.mean_hours,
            "spread": usual.spread,
            "gpus": sum(kind.machines for kind in usual.kinds),
            "boot": usual.boot,
            "restart": usual.restart,
            "stall": usual.stall,
            "latency": usual.latency,
            "outage_hours": usual.outage_hours,
            "notice": usual.notice,
            "mixed": [dataclasses.asdict(kind) for kind in BOTH],
            "large_share": LARGE_SHARE,
        },
        "loss_rates": LOSS_RATES,
        "defaults": {
            "prior": dataclasses.asdict(ASSUMED),
            "bounds": dataclasses.asdict(USUAL),
            "boot": arrival.ASSUMED_BOOT,
        },
        "bound_hours": spread([outcome.bound / HOUR for outcome in runs()]),
        "bound_dollars": spread([outcome.bound_dollars for outcome in runs()]),
        "order": order(runs),
        "interval": interval(runs),
        "assumption": assumption(runs),
        "arrival": expensive(runs),
        "mixed": mixed(runs),
    }
    write_result("simulator", result)
    plot(result)


if __name__ == "__main__":
    main()
