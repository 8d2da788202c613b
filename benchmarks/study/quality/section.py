"""Generates a section of RESULTS.md from results/cells.jsonl and tried.json; only the numbers in tried.json are typed by hand."""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.study.compare.arms import REFERENCE
from benchmarks.study.quality.cells import STARTS
from benchmarks.study.quality.levers import FOR_TOKENS, LEVERS, REMOVED, TITLES
from benchmarks.study.quality.records import CellFigures
from benchmarks.study.quality.result_files import CELLS, PUBLISHED, read_lines
from benchmarks.study.quality.summary import FIGURES, LOW, MORE, Entry, summarise

TRIED = Path(__file__).resolve().with_name("tried.json")
COLUMNS = {
    "ppl_equal_tokens": "perplexity, equal tokens", "ppl_equal_dollars": "perplexity, equal dollars",
    "ppl_equal_hours": "perplexity, equal hours", "dollars_to_joint_loss_ratio": "dollars to its loss",
    "unseen_equal_tokens": "perplexity on other sources, equal tokens",
    "metered_to_joint_loss": "metered dollars to its loss", "dollars_equal_tokens": "dollars, equal tokens",
    "hours_equal_tokens": "hours, equal tokens",
    "hours_equal_dollars": "hours, equal dollars"}
HEAD = ["corpus, family, start", "arm", "seeds", *COLUMNS.values()]
LEVERS_HEAD = [
    "corpus, family, start", "the default", "seeds", "perplexity, equal tokens", "the default's own, same seeds",
    "over the default's, seed by seed"]
TRIED_HEAD = ["what", "measured", "commit", "verdict"]
PRICES_HEAD = ["a FLOP on the cheap pool costs", "the default: dollars to joint training's loss", "the paper's recipe"]
_PRICES = {
    0.1: "", 0.35 / 2.28 / 0.72: "the paper's prices, speed 0.72: as above", 0.35 / 2.28 / 0.53: "the paper's prices, speed 0.53",
    0.5: "", 1.0: "one price: operations alone"}
"""Price of a FLOP on the cheap pool relative to the expensive pool. Speed 0.53 is from the cards' data sheets (bf16, 165 against
312 TFLOP/s)."""
_SINGLE = {*LEVERS, *REMOVED}
"""Arms that change one setting of the default."""
_TITLES = {
    "disco-low": "MoE-DisCo, as configured, its gang on the low-memory pool",
    # The published runs of this arm are older than its router.
    "spes": "SPES-like, H = 100, without a live router in the sub-models"}
_TARGETS = (
    ("disco", "ppl_equal_dollars", 0.9, "", STARTS), ("disco", "dollars_to_joint_loss_ratio", 0.5, ", the floor", STARTS),
    ("disco", "dollars_to_joint_loss_ratio", 0.3, ", the goal", STARTS),
    ("disco", "loss_equal_tokens", 1.01, ", from a common seed", ("seed",)),
    ("long-finetune", "loss_equal_tokens", 1.01, ", from a common seed", ("seed",)))
"""Targets: arm, figure, maximum ratio to joint training, label, and the starts whose cells count."""
_CALLED = {"disco": "the default", "long-finetune": "the default with a long fine-tune"}
_ONE_RUN = ("ensemble",)
"""Arms with a single run, at joint training's dollars: if it reaches joint training's loss, a shorter run might do so too."""
_ON_CHEAP_CARDS = (("disco", "the default as configured"), (LOW["disco"], "the default with its gang there too"))
"""Arms that are compared with joint training on the low-memory pool alone."""


@functools.cache
def results() -> tuple[CellFigures, ...]:
    """The published figures of every (cell, seed)."""
    return tuple(read_lines(PUBLISHED / CELLS, CellFigures))


def rows() -> list[list[str]]:
    """One row per cell and arm; every figure is a ratio to joint training on the high-memory pool."""
    return [
        [
            _cell(entry), _TITLES.get(entry.arm) or TITLES[entry.arm], str(len(entry.seeds)),
            *(_span(entry, name) for name in COLUMNS)]
        for entry in _entries() if entry.arm not in _SINGLE]


def levers() -> list[list[str]]:
    """One row per lever and cell: perplexity at equal tokens with the lever reset, relative to the default's."""
    return [
        [
            _cell(entry), TITLES[entry.arm], str(len(entry.seeds)), _span(entry, "ppl_equal_tokens"),
            _default_of(entry), _over_default(entry)]
        for entry in _entries() if entry.arm in _SINGLE]


def prices() -> list[list[str]]:
    """One row per price of the cheap pool: cost to reach joint training's loss, over all cells."""
    lines = []
    for price, words in _PRICES.items():
        entries = summarise(results(), ("dollars_to_joint_loss_ratio",), price)
        found = [
            [entry.medians["dollars_to_joint_loss_ratio"] for entry in entries if entry.arm == arm] for arm in ("disco", "paper")]
        lines.append([f"{price:.2f} of one on the other{' (' if words else ''}{words}{')' if words else ''}", *map(_range, found)])
    return lines


def verdicts() -> list[str]:
    """One line per target: the number of cells that reach it, and the cells that do not."""
    cells = [entry for entry in _entries() if entry.arm == "disco"]
    lines = []
    for arm, name, most, words, starts in _TARGETS:
        asked = [entry for entry in _entries() if entry.arm == arm and entry.start in starts]
        missed = [entry for entry in asked if (ratio := entry.medians[name]) is None or ratio > most]
        lines.append(f"* `{name}` of {_CALLED[arm]} at most {most}{words}: {_verdict(asked, missed)}")
    ratios = {(_cell(entry), entry.arm): entry.medians["dollars_to_joint_loss_ratio"] for entry in _entries()}
    for arm, words in _ON_CHEAP_CARDS:
        costlier = [
            entry for entry in cells
            if _costs_as_much(ratios.get((_cell(entry), arm)), ratios.get((_cell(entry), LOW[REFERENCE])))]
        lines.append(f"* cheaper than joint training on the low-memory pool alone, {words}: {_verdict(cells, costlier)}")
    return lines


def joint_tokens() -> str:
    """Training tokens of joint training."""
    return _once(f"{result.setting.tokens:,}" for result in results())


def tried() -> list[list[str]]:
    """Experiments without a result file, typed by hand in tried.json."""
    found: list[dict[str, str]] = json.loads(TRIED.read_text(encoding="utf-8"))
    return [[each[name] for name in TRIED_HEAD] for each in found]


def made_with() -> str:
    """Software and machines with which the results were made, each once."""
    found = results()
    parts = {
        "": [f"`{result.command.replace(result.cell, 'CELL')}`" for result in found],
        "commit": [commit for result in found for commit in result.commits],
        "recipe": [f"{result.setting.recipe} ({result.cell.partition('/')[2]})" for result in found],
        "seed": [str(result.seed) for result in found],
        "on": [f"{result.date}, {result.processor}, {result.cores} cores" for result in found],
        "with": [", ".join(f"{name} {version}" for name, version in result.versions.items()) for result in found],
        "setting": [f"`{json.dumps(result.setting.model_dump(exclude={'seed', 'recipe'}))}`" for result in found]}
    return "; ".join(f"{name} {_once(values)}".strip() for name, values in parts.items())


def _entries() -> list[Entry]:
    return summarise(results(), (*FIGURES, *MORE))


def _default_of(lever: Entry) -> str:
    """The default's figure in the lever's cell and seeds; a dash if it was not run with all of these seeds."""
    same = [result for result in results() if result.seed in lever.seeds]
    return next(
        (_span(entry, "ppl_equal_tokens") for entry in summarise(same)
         if entry.arm == "disco" and _cell(entry) == _cell(lever) and entry.seeds == lever.seeds), "-")


def _over_default(lever: Entry) -> str:
    """Perplexity relative to the default's at the same seed, which shows differences smaller than those between seeds."""
    ratios = []
    for result in results():
        found = {run.arm: run.perplexity for run in result.runs if run.budget == "tokens"}
        if result.cell == _cell(lever, "/") and {lever.arm, "disco"} <= found.keys():
            ratios.append(found[lever.arm] / found["disco"])
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})" if ratios else "-"


def _cell(entry: Entry, between: str = ", ") -> str:
    return between.join((entry.corpus, entry.family, entry.start))


def _costs_as_much(ours: float | None, theirs: float | None) -> bool:
    return ours is None or theirs is None or ours >= theirs


def _verdict(asked: Sequence[Entry], missed: Sequence[Entry]) -> str:
    if not asked:
        return "not run"
    where = ", ".join(_cell(entry, "/") for entry in missed)
    return f"**missed** in {where}" if missed else f"met in all {len(asked)} cells that were run"


def _range(ratios: Sequence[float | None]) -> str:
    reached = [ratio for ratio in ratios if ratio is not None]
    if not reached:
        return "never"
    median = statistics.median(ratio or math.inf for ratio in ratios)
    text = f"{'never' if median == math.inf else f'{median:.2f}'} ({min(reached):.2f} to {max(reached):.2f}"
    return text + ")" if len(reached) == len(ratios) else f"{text}; never in {len(ratios) - len(reached)} of {len(ratios)} cells)"


def _once(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _span(entry: Entry, name: str) -> str:
    if name in entry.spread:
        spread, median = entry.spread[name], entry.medians[name]
        most = "at most " if name == "dollars_to_joint_loss_ratio" and entry.arm in _ONE_RUN else ""
        if len(entry.seeds) == 1:
            return f"{most}{median:.2f}"
        return f"{most}{median:.2f} ({spread.min:.2f} to {spread.max:.2f})"
    return "never" if name == "dollars_to_joint_loss_ratio" and entry.arm not in FOR_TOKENS else "-"
