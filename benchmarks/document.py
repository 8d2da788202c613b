"""RESULTS.md from results/*.json; no number in it is typed by hand."""

from __future__ import annotations

import json
from typing import Any

from harness import RESULTS, ROOT


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
    return "\n\n".join([f"## {title}", " ".join(text.split()), *parts])


def made_with(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    dirty = " with uncommitted changes" if result["dirty"] else ""
    where = f"commit {result['commit']}{dirty}, {result['date']}, {result['processor']}, {result['cores']} cores"
    return f"`{result['command']}`, {where}; {versions}; `{json.dumps(result['setting'])}`"


def submodel_step() -> str:
    result = read("submodel_step")
    rows = [[arm, span(speed)] for arm, speed in result["tokens_per_second"].items()]
    verdicts = []
    for name, target in result["targets"].items():
        verdict = "met" if result[name]["median"] >= target else "**missed**"
        verdicts.append(f"* `{name}`: {span(result[name])}, target {target}: {verdict}")
    return section(
        "A sub-model's training step",
        """Steady-state tokens per second of one thread on the same sizes, data and optimizer. *ours*: the product's loop on a
        one-expert sub-model, progress events included. *bare*: the shortest PyTorch loop on the dense Hugging Face model of the
        same sizes. *trainer*: the Hugging Face Trainer on it.""",
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
        f"""Seconds to cluster the same vectors on one core, with as many restarts each. Inertia is the median over the rounds'
        seeds, relative to the best arm's; a time counts where it is within {result["setting"]["inertia_tolerance"]:.1%} of it. A
        ratio below 1 means that ours is faster.""",
        table(["setting", "arm", "seconds", "inertia / best", "counts", "ours / arm"], rows), made_with(result))


def ray_overhead() -> str:
    result = read("ray_overhead")
    seconds = result["seconds"]
    rows = [
        [stage, span(seconds["ray"][stage]), span(seconds["plain"][stage]), span(adds)]
        for stage, adds in result["ray_adds"].items()]
    return section(
        "What Ray adds to the demo",
        """Seconds per stage of `moedisco run` with the demo preset, on fewer tokens, on a local Ray, and of the same run in one
        plain process that trains one sub-model after the other. *Outside stages* is starting and stopping Ray.""",
        table(["stage", "on Ray", "plain", "Ray adds"], rows), made_with(result))


_INTRODUCTION = """Machines like the one these were measured on are noisy: read ratios and medians, not single figures. Arms run in
turn, each as a whole process. This page is written by `python benchmarks/document.py` from `benchmarks/results/`; `make bench`
measures again."""

if __name__ == "__main__":
    page = ["# Results", " ".join(_INTRODUCTION.split()), submodel_step(), kmeans(), ray_overhead()]
    (ROOT / "RESULTS.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
