"""What all benchmarks share: arms as processes that take turns, medians and ratios, and a file with their results."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moedisco_ray.core.store.artifacts import versions

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"


def environment(command: str, package: str = "moedisco_ray") -> dict[str, Any]:
    """Where and with what a result was measured; `package` is what was."""
    return {
        "command": command,
        "commit": commit_of(ROOT),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no", "--", f"../{package}")),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "versions": versions(),
    }


def run_arm(module: str, arm: str, *arguments: str, checkout: Path | None = None) -> dict[str, Any]:
    """Run `python -m MODULE --arm ARM` as a process with one thread; its last line of output is a JSON object.

    Args:
        module: Takes `--arm`.
        arm: Its name.
        arguments: Passed on.
        checkout: Where the module and what it measures come from, if not from here.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, "-m", module, "--arm", arm, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=checkout,
        env={**os.environ, **threads, "PYTHONWARNINGS": "ignore"},
    )
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def interleave(
    module: str, arms: Sequence[str], rounds: int, *arguments: str, seeded: bool = False
) -> dict[str, list[dict[str, Any]]]:
    """Every arm in turn, `rounds` times, so that a machine whose speed drifts slows all of them alike.

    Args:
        module: Takes `--arm`.
        arms: Their names.
        rounds: How often.
        arguments: Passed on.
        seeded: Pass the round on as `--seed` too.
    """
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for turn in range(rounds):
        for arm in arms:
            results[arm].append(run_arm(module, arm, *arguments, *(("--seed", str(turn)) if seeded else ())))
            print(f"round {turn + 1}/{rounds} {arm}: {results[arm][-1]}", file=sys.stderr)
    return results


def figures(results: Iterable[Mapping[str, Any]], name: str) -> list[Any]:
    """The figure `name` of each result."""
    return [result[name] for result in results]


def by_arm(rounds: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> dict[str, list[Any]]:
    """The figure `name` of each arm's results."""
    return {arm: figures(results, name) for arm, results in rounds.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Smallest, median and largest."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def spreads(results: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, dict[str, float]]:
    """The spread of each figure over the results."""
    return {name: spread(figures(results, name)) for name in names}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Round by round, ours over theirs."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def differences(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Round by round, ours minus theirs."""
    return spread([a - b for a, b in zip(ours, theirs, strict=True)])


def write_result(name: str, result: dict[str, Any]) -> None:
    """Keep a result where the document is generated from."""
    RESULTS.mkdir(exist_ok=True)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in shortened(result).items())
    (RESULTS / f"{name}.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def shortened(value: Any) -> Any:
    """A JSON value whose fractions have six digits; further ones are noise."""
    if isinstance(value, Mapping):
        return {key: shortened(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [shortened(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def commit_of(checkout: Path) -> str:
    """The commit of a checkout."""
    return _git("rev-parse", "--short=12", "HEAD", checkout=checkout)


def _git(*arguments: str, checkout: Path = ROOT) -> str:
    done = subprocess.run(["git", *arguments], cwd=checkout, check=True, capture_output=True, text=True)  # noqa: S607
    return done.stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
