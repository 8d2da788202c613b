"""What the sections of RESULTS.md are written with."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.harness import RESULTS


def read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:,.2f}"


def span(values: dict[str, float]) -> str:
    return f"{number(values['median'])} ({number(values['min'])} to {number(values['max'])})"


def spans(cell: dict[str, Any], *names: str) -> list[str]:
    return [span(cell[name]) for name in names]


def span_of(cells: dict[str, Any], arm: str) -> str:
    """The span of an arm; empty for an arm without this figure."""
    return span(cells[arm]) if arm in cells else ""


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
    setting = f"; `{json.dumps(result['setting'])}`" if "setting" in result else ""
    return f"`{result['command']}`, {where}; {versions}{setting}"


def at_least(what: str, measured: dict[str, float], target: float) -> str:
    return f"* {what}: {span(measured)}, target {number(target)}: {_verdict(met=measured['median'] >= target)}"


def at_most(what: str, measured: dict[str, float], target: float) -> str:
    return f"* {what}: {span(measured)}, at most {number(target)}: {_verdict(met=measured['median'] <= target)}"


def _verdict(*, met: bool) -> str:
    return "met" if met else "**missed**"
