"""Tables of absolute figures: perplexity, bits per byte, perplexity by domain, routing."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from benchmarks.study.compare.arms import REFERENCE
from benchmarks.study.compare.records import Budget
from benchmarks.study.quality.levers import TITLES
from benchmarks.study.quality.records import AbsoluteFigures, CellFigures, RunFigures

HEAD = [
    "corpus, family, start", "arm", "perplexity", "bits per byte", "perplexity on other sources",
    "experts and sources, NMI", "experts and clusters, NMI", "dead experts", "metered worker-seconds"]
DOMAINS_HEAD = ["corpus, domain", "joint training's perplexity", "the default's over it, equal tokens", "equal dollars"]
SHOWN = (REFERENCE, "disco", "paper")
"""Arms in these tables."""
_COMPARED: tuple[tuple[str, Budget], ...] = ((REFERENCE, "tokens"), ("disco", "tokens"), ("disco", "dollars"))
"""Arm and budget of the runs that are compared by domain."""


def rows(results: Iterable[CellFigures]) -> list[list[str]]:
    """One row per cell and arm at equal tokens, with medians over the seeds."""
    return [
        [
            cell.replace("/", ", "), TITLES[arm],
            _median((run.perplexity for run, _ in found), 1), _median((own.bits_per_byte for _, own in found), 3),
            _median((run.unseen for run, _ in found), 1),
            *(_median((own.specialisation.get(name) for _, own in found), 2) for name in ("source", "cluster")),
            _median((own.dead_experts for _, own in found), 0), _median((own.worker_seconds for _, own in found), 0)]
        for (cell, arm), found in _by_cell(results).items()]


def domains(results: Iterable[CellFigures]) -> list[list[str]]:
    """One row per domain of a corpus, with medians over families, starts and seeds."""
    by_domain: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for result in results:
        sources = {(run.arm, run.budget): run.absolute.sources for run in result.runs if run.absolute}
        if not sources.keys() >= set(_COMPARED):
            continue
        joint, at_tokens, at_dollars = (sources[run] for run in _COMPARED)
        for domain, perplexity in joint.items():
            by_domain.setdefault((result.cell.split("/")[0], domain), []).append(
                (perplexity, at_tokens[domain] / perplexity, at_dollars[domain] / perplexity))
    return [
        [f"{corpus}, {domain}", *(f"{statistics.median(each):.{digits}f}" for each, digits in zip(
            zip(*found, strict=True), (1, 2, 2), strict=True))]
        for (corpus, domain), found in sorted(by_domain.items())]


def _by_cell(results: Iterable[CellFigures]) -> dict[tuple[str, str], list[tuple[RunFigures, AbsoluteFigures]]]:
    found: dict[tuple[str, str], list[tuple[RunFigures, AbsoluteFigures]]] = {}
    for result in results:
        for run in result.runs:
            if run.budget == "tokens" and run.absolute:
                found.setdefault((result.cell, run.arm), []).append((run, run.absolute))
    return found


def _median(values: Iterable[float | None], digits: int) -> str:
    each = list(values)
    known = [value for value in each if value is not None]
    return f"{statistics.median(known):.{digits}f}" if len(known) == len(each) else "-"
