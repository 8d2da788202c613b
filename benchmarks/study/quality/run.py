"""Compares the default recipe with joint training of the same MoE and with other recipes, at equal tokens and at equal dollars.

python -m benchmarks.study.quality.run, with
    --cell a/qwen3_moe/random --corpus DIR                   the default and the paper's recipe in one cell, CORPUS/FAMILY/START
    --cell a/qwen3_moe/random --arms all --corpus DIR        every other recipe
    --cell a/qwen3_moe/random --arms levers --corpus DIR     each lever alone
    --cell a/qwen3_moe/random --arms tokens --corpus DIR     arms for limited text

`python -m benchmarks.study grid` measures cells over activation and budget. Here, a cell has four experts, half of them active.

Every (cell, seed) is a process with one thread. Finished work is skipped: each arm is a product run, which can resume, and the rows
of a (cell, seed) are a file in --results, to which arms can be added later. With an empty --results, finished runs are accounted
again and not trained again. `python -m benchmarks.study.quality.publish` then updates results/ next to this file, from which
RESULTS.md is made.

Cost: with T tokens for joint training, a (cell, seed) trains about 11 T. These are T each for joint training, the default and the
paper's recipe; the tokens that joint training's dollars buy for the latter two, mostly on the cheap pool; and the tokens that the
default is predicted to need for joint training's loss. Joint training and the default with their gangs on the cheap pool are not
run again, only priced there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.harness import environment
from benchmarks.study.compare.arms import ARMS, REFERENCE
from benchmarks.study.compare.records import Budget, Row
from benchmarks.study.compare.run import BUDGETS, compare
from benchmarks.study.quality.cells import OWN_RECIPES, RECIPES, SIZES, START_TOKENS, STARTS, Cell, base_config, own_arms
from benchmarks.study.quality.levers import FOR_TOKENS, KNOWN, LEVERS
from benchmarks.study.quality.records import CellResult, Setting
from benchmarks.study.quality.result_files import RAW, read, write
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.execution.local_backend import LocalBackend

BASE = ("disco", "paper")
"""Arms that are measured unless others are named."""
FOR_DOLLARS = ("joint-low", "ensemble")
"""Arms that run only at equal dollars (levers run only at equal tokens); their other budget would give no new information."""
GROUPS = {
    "base": BASE, "levers": (*BASE, *LEVERS), "tokens": tuple(FOR_TOKENS),
    "all": tuple(name for name in ARMS if name != REFERENCE)}
_ANY_TOKENS = 200_000
"""Tokens of the configuration from which the recipe's digest is computed; arbitrary but fixed."""


def measure(cell: Cell, seed: int, arguments: argparse.Namespace) -> list[Row]:
    """Measure one (cell, seed) in this process; returns its rows, joint training first."""
    torch.set_num_threads(1)
    work = arguments.work / cell.slug / f"seed-{seed}"
    base = base_config(cell, seed, arguments.tokens, arguments.corpus, work)
    rows: dict[tuple[str, str], Row] = {}
    known = own_arms(KNOWN, cell.family, cell.start)
    for budgets, wanted in _by_budgets(arguments.arms):
        found = compare(base, work, wanted, budgets=budgets, backend=LocalBackend(), known=known).rows
        rows |= {(row.arm, row.budget): row for row in found if row.arm in (REFERENCE, *arguments.arms)}
    return list(rows.values())


def _by_budgets(arms: list[str]) -> list[tuple[tuple[Budget, ...], list[str]]]:
    groups: dict[tuple[Budget, ...], list[str]] = {}
    for arm in arms:
        budgets: tuple[Budget, ...] = (*BUDGETS, "loss") if arm == "disco" else BUDGETS
        if arm in FOR_DOLLARS:
            budgets = ("dollars",)
        elif arm in {*LEVERS, *FOR_TOKENS}:
            budgets = ("tokens",)
        groups.setdefault(budgets, []).append(arm)
    return list(groups.items())


def run_process(cell: Cell, seed: int, arguments: argparse.Namespace) -> None:
    """Run the missing arms of one (cell, seed) in a separate process, and add them to its result file."""
    path = arguments.results / f"{cell.slug}-{seed}.json"
    setting = Setting(
        model=SIZES, tokens=arguments.tokens, seed=seed, recipe=_recipe(cell), low_over_high=_low_over_high())
    before = read(path) if path.exists() else None
    if before is not None and before.setting != setting:
        raise SystemExit(f"{path} was measured with another setting or recipe; move it away")
    missing = [arm for arm in arguments.arms if before is None or arm not in {row.arm for row in before.rows}]
    if not missing:
        return
    started = time.time()
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    command = [
        sys.executable, "-m", "benchmarks.study.quality.run", "--worker", str(seed), "--cell", str(cell),
        "--tokens", str(arguments.tokens), "--work", str(arguments.work), "--arms", ",".join(missing)]
    if arguments.corpus is not None:
        command += ["--corpus", str(arguments.corpus)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **threads})
    rows = [Row.model_validate(row) for row in json.loads(done.stdout.strip().splitlines()[-1])]
    corpora = "" if arguments.corpus is None else " --corpus DIR"
    made = environment(
        f"python -m benchmarks.study.quality.run --cell {cell} --seeds {arguments.seeds} --tokens {arguments.tokens}"
        f" --arms {','.join(arguments.arms)}{corpora}")
    write(path, extended(before, rows, made, cell=cell, setting=setting, seconds=time.time() - started).model_dump(mode="json"))


def extended(
    before: CellResult | None, rows: Sequence[Row], made: Mapping[str, Any], *, cell: Cell, setting: Setting, seconds: float,
) -> CellResult:
    """A raw result with the rows of new arms added.

    Args:
        before: Raw result so far.
        rows: Rows of the new arms, joint training first; joint training is added only once.
        made: Record from `harness.environment`.
        cell: Cell of the result.
        setting: Setting of all rows.
        seconds: Time of the new measurements (s).
    """
    commit = f"{made['commit']}{' with uncommitted changes' if made['dirty'] else ''}"
    return CellResult(
        **{name: made[name] for name in ("command", "date", "processor", "cores", "versions")},
        commits=tuple(dict.fromkeys([*(before.commits if before else ()), commit])), setting=setting,
        seconds=round(seconds + (before.seconds if before else 0), 1), cell=str(cell), seed=setting.seed,
        rows=(*(before.rows if before else rows[:1]), *rows[1:]))


def _recipe(cell: Cell) -> str:
    """Digest of the default recipe, so that no table mixes results of two defaults; titles do not change it."""
    base = base_config(Cell("embedded", "qwen3_moe", "random"), 0, _ANY_TOKENS, None, Path("work"))
    rest = [START_TOKENS, RECIPES[cell.start], OWN_RECIPES[cell.family, cell.start], *STARTS[cell.start]]
    text = json.dumps([base.model_dump(mode="json"), *rest], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _low_over_high() -> float:
    """The price of a FLOP on the low-memory pool over that on the high-memory pool."""
    pools = RunConfig.model_validate(yaml.safe_load(preset_text("default"))).pools
    low, high = (pool.price_per_hour / pool.speed for pool in (pools.low_memory, pools.high_memory))
    return low / high


def _arms(text: str) -> list[str]:
    return [arm for part in text.split(",") for arm in GROUPS.get(part, (part,))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", type=Cell.parse, action="append", default=[], help="CORPUS/FAMILY/START; may be repeated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=400_000, help="training tokens of joint training")
    parser.add_argument(
        "--arms", type=_arms, default=_arms("base"), help=f"{', '.join(GROUPS)}, or some of {', '.join(KNOWN)}")
    parser.add_argument("--corpus", type=Path, default=os.environ.get("MOEDISCO_CORPORA"), help="folder of the corpora")
    parser.add_argument("--work", type=Path, default=Path("runs") / "quality", help="run directories, kept for resuming")
    parser.add_argument("--results", type=Path, default=RAW, help="folder of the raw results")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.corpus = Path(arguments.corpus) if arguments.corpus else None
    if arguments.worker is not None:
        print(json.dumps([row.to_json() for row in measure(arguments.cell[0], arguments.worker, arguments)]))
        return 0
    if not arguments.cell:
        parser.error("name a --cell")
    for seed in range(arguments.seeds):
        for cell in arguments.cell:
            run_process(cell, seed, arguments)
            print(f"{cell} seed {seed}: done", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
