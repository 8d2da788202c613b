"""The section of RESULTS.md, from results/summary.json; no number in it is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moedisco_ray.compare.arms import REFERENCE
from quality.cells import STARTS
from quality.levers import KNOWN, LEVERS
from quality.summary import LOW

RESULTS = Path(__file__).resolve().parent / "results"
HEAD = ["corpus, family, start", "arm", "seeds", "perplexity, equal tokens", "perplexity, equal dollars", "dollars to its loss"]
LEVERS_HEAD = ["corpus, family, start", "the default", "seeds", "perplexity, equal tokens", "the default's own"]
_TITLES = {"disco-low": "MoE-DisCo, as configured, its gang on the low-memory pool"}
_TARGETS = (
    ("ppl_equal_dollars", 0.9, "", STARTS), ("dollars_to_joint_loss_ratio", 0.5, ", the floor", STARTS),
    ("dollars_to_joint_loss_ratio", 0.3, ", the goal", STARTS),
    ("loss_equal_tokens", 1.01, ", from a common seed", ("seed",)))
"""What the default must reach, at most so much of joint training's, and in cells of which starts."""


def rows() -> list[list[str]]:
    """One per cell and arm; every figure is a ratio to joint training on the high-memory pool."""
    return [
        [
            _cell(entry), _TITLES.get(entry["arm"]) or KNOWN[entry["arm"]].title,
            str(len(entry["seeds"])),
            *(_span(entry, name) for name in ("ppl_equal_tokens", "ppl_equal_dollars", "dollars_to_joint_loss_ratio"))]
        for entry in _summary() if entry["arm"] not in LEVERS]


def levers() -> list[list[str]]:
    """One per lever and cell in which it was put back: what the perplexity at equal tokens is then, against the default's."""
    defaults = {_cell(entry): entry for entry in _summary() if entry["arm"] == "disco"}
    return [
        [_cell(entry), KNOWN[entry["arm"]].title, str(len(entry["seeds"])), _span(entry, "ppl_equal_tokens"),
         _span(defaults[_cell(entry)], "ppl_equal_tokens")]
        for entry in _summary() if entry["arm"] in LEVERS]


def _cell(entry: dict[str, Any]) -> str:
    return f"{entry['corpus']}, {entry['family']}, {entry['start']}"


def verdicts() -> list[str]:
    """In how many cells the default reaches its targets, and in which it does not."""
    cells = [entry for entry in _summary() if entry["arm"] == "disco"]
    lines = []
    for name, most, words, starts in _TARGETS:
        asked = [entry for entry in cells if entry["start"] in starts]
        missed = [entry for entry in asked if entry[name] is None or entry[name] > most]
        lines.append(f"* `{name}` of the default at most {most}{words}: {_verdict(asked, missed)}")
    cheap = {(_cell(entry), entry["arm"]): entry["dollars_to_joint_loss_ratio"] for entry in _summary()}
    dearer = [
        entry for entry in cells
        if (ours := cheap[_cell(entry), LOW["disco"]]) is None or ours >= cheap[_cell(entry), LOW[REFERENCE]]]
    lines.append(f"* cheaper than joint training where both are on the low-memory pool alone: {_verdict(cells, dearer)}")
    return lines


def _verdict(asked: Sequence[dict[str, Any]], missed: Sequence[dict[str, Any]]) -> str:
    where = ", ".join(f"{entry['corpus']}/{entry['family']}/{entry['start']}" for entry in missed)
    return f"**missed** in {where}" if missed else f"met in all {len(asked)} cells that were run"


def made_with() -> dict[str, Any]:
    """How one of the newest results was made."""
    paths = sorted(path for path in RESULTS.glob("*.json") if path.stem != "summary")
    found: list[dict[str, Any]] = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return max(found, key=lambda result: str(result["date"]))


def _summary() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / "summary.json").read_text(encoding="utf-8"))
    return found


def _span(entry: dict[str, Any], name: str) -> str:
    if name in entry["spread"]:
        spread = entry["spread"][name]
        if len(entry["seeds"]) == 1:
            return f"{entry[name]:.2f}"
        return f"{entry[name]:.2f} ({spread['min']:.2f} to {spread['max']:.2f})"
    return "never" if name == "dollars_to_joint_loss_ratio" else "-"
