"""Tests whether `python -m benchmarks.study compare` ranks arms like the tuned benchmark, on domains that no recipe was tuned on.

    python -m benchmarks.study.quality.ranking --seeds 2

The domains are those of the embedded corpus. Each seed is compared three times: with every arm at the default's batch size and
rate (`compare --slice-tokens 0`); with arms tuned by `compare`; and with the batch sizes and rates tuned for the grid's baselines.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import environment, write_result
from benchmarks.study.compare.arms import ARMS, REFERENCE, Arm
from benchmarks.study.compare.run import compare
from benchmarks.study.quality.cells import Cell, base_config, own_arms
from moedisco_ray.execution.local_backend import LocalBackend

CELL = Cell("embedded", "qwen3_moe", "random")
NAMES = (REFERENCE, "disco", "upcycle", "paper")


def one_seed(seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Loss of every arm at equal tokens minus joint training's (nats per token), by tuning method."""
    work = arguments.work / f"seed-{seed}"
    base = base_config(CELL, seed, arguments.tokens, None, work)
    arms: dict[str, Arm] = {name: ARMS[name] for name in NAMES}
    tuned = own_arms(arms, CELL.family, CELL.start)
    found = {}
    for how, known, slice_tokens in (("as configured", arms, 0), ("compare", arms, arguments.tokens // 4), ("benchmark", tuned, 0)):
        output = work / how.replace(" ", "-")
        result = compare(base, output, budgets=("tokens",), backend=LocalBackend(), known=known, slice_tokens=slice_tokens)
        found[how] = {
            "loss": {row.arm: row.loss for row in result.rows},
            "over_joint": {row.arm: row.loss - result.rows[0].loss for row in result.rows},
            "ranking": [row.arm for row in sorted(result.rows, key=lambda row: row.loss)],
            "tuned": {row.arm: row.tuned and row.tuned.to_json() for row in result.rows}}
        print(f"seed {seed}, {how}: {found[how]['ranking']} {found[how]['over_joint']}", file=sys.stderr)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=400_000, help="training tokens of every arm")
    parser.add_argument("--work", type=Path, default=Path("runs") / "ranking", help="run directories, kept for resuming")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.nice(5)
    seeds = [one_seed(seed, arguments) for seed in range(arguments.seeds)]
    write_result("ranking", {
        **environment(f"python -m benchmarks.study.quality.ranking --seeds {arguments.seeds} --tokens {arguments.tokens}"),
        "setting": {"cell": str(CELL), "tokens": arguments.tokens, "arms": list(NAMES)}, "seeds": seeds})
    same = [seed["compare"]["ranking"] == seed["benchmark"]["ranking"] for seed in seeds]
    print(f"{sum(same)} of {len(same)} seeds are ranked as by the tuned benchmark")
    return 0 if all(same) else 1


if __name__ == "__main__":
    raise SystemExit(main())
