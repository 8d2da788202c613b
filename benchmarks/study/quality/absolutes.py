"""Tables of absolute figures: perplexity, bits per byte, perplexity by domain, routing."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.study.compare.arms import REFERENCE

HEAD = [
    "corpus, family, start", "arm", "perplexity", "bits per byte", "perplexity on other sources",
    "experts and sources, NMI", "experts and clusters, NMI", "dead experts", "metered worker-seconds"]
DOMAINS_HEAD = ["corpus, domain", "joint training's perplexity", "the default's over it, equal tokens", "equal dollars"]
_SHOWN = (REFERENCE, "disco", "paper")


def rows(results: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """One row per cell and arm at equal tokens, with medians over the seeds."""
    return [
        [
            cell.replace("/", ", "), found[0]["title"],
            *(_median(found, lambda row, key=key: row[key], digits) for key, digits in (
                ("perplexity", 1), ("bits_per_byte", 3), ("unseen", 1))),
            *(_median(found, lambda row, key=key: row["specialisation"][key], 2) for key in ("source", "cluster")),
            _median(found, lambda row: row["dead_experts"], 0), _median(found, lambda row: sum(row["worker_seconds"].values()), 0)]
        for (cell, _), found in _by_cell(results).items()]


def domains(results: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """One row per domain of a corpus, with medians over families, starts and seeds."""
    told: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for result in results:
        runs = {(row["arm"], row["budget"]): row["sources"] for row in result["rows"] if row["sources"]}
        keys = ((REFERENCE, "tokens"), ("disco", "tokens"), ("disco", "dollars"))
        if not all(key in runs for key in keys):
            continue
        joint, same, dear = (runs[key] for key in keys)
        for domain, perplexity in joint.items():
            told.setdefault((result["cell"].split("/")[0], domain), []).append(
                (perplexity, same[domain] / perplexity, dear[domain] / perplexity))
    return [
        [f"{corpus}, {domain}", *(f"{statistics.median(each):.{digits}f}" for each, digits in zip(
            zip(*found, strict=True), (1, 2, 2), strict=True))]
        for (corpus, domain), found in sorted(told.items())]


def _by_cell(results: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for result in results:
        for row in result["rows"]:
            if row["budget"] == "tokens" and row["arm"] in _SHOWN:
                found.setdefault((result["cell"], row["arm"]), []).append(row)
    return found


def _median(found: Sequence[Mapping[str, Any]], value: Any, digits: int) -> str:
    values = [value(row) for row in found]
    return "-" if None in values else f"{statistics.median(values):.{digits}f}"
