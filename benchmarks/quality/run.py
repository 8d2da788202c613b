"""The default recipe against joint training of the same MoE, and against the other recipes: `moedisco compare` over a grid.

    python benchmarks/quality/run.py --cell small/qwen3_moe/random --seeds 3 --corpus DIR     one cell
    python benchmarks/quality/run.py --grid --seeds 3 --corpus DIR                            corpora x families x starts
    python benchmarks/quality/run.py --quick                                                  three minutes: default against paper

Every (cell, seed) is a process with one thread, `--jobs` of them at once. What is finished is skipped: each arm is a run of the
product with its own resumption, and a finished (cell, seed) is a file in results/.

The budget. With T tokens for joint training, a (cell, seed) trains about 15 T: T for joint training and for each of the arms at
equal tokens, 3 to 4 T for the default and the paper's recipe at equal dollars, since their tokens are mostly cheap. Joint training
on the cheap pool is not run again: its curve is joint training's, at 0.213 of the price per token (0.35 / 2.28 / 0.72).
Measured in CPU-seconds on one core: 11,000 tokens of joint training a second (60,000 in 5.4 s; Mixtral 5.2 s), 15,000 of a
sub-model, 0.73 s for a look at the held-out loss, of which joint training takes 20, up to 26 s to cluster a corpus of 8 x 360 kB.
So with T = 400,000 a (cell, seed) is about 15 minutes of a core, and 2 corpora x 2 families x 2 starts x 3 seeds take 3 hours on 2
idle cores.
`run.py` says how long it will take before it begins, from `--speed`, the tokens per second of a core with all of this in it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from cells import SIZES, Cell, base_config
from summary import summarise

from moedisco_ray.cli import output_console
from moedisco_ray.compare.arms import ARMS, REFERENCE
from moedisco_ray.compare.run import compare
from moedisco_ray.compare.table import compare_view
from moedisco_ray.in_process import InProcess

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
sys.path.append(str(HERE.parent))
harness: Any = importlib.import_module("harness")    # the other benchmarks' common parts, one folder up

BOTH = ("disco", "paper")
"""Arms that are run for as many dollars too; the others at as many tokens alone."""
FAMILIES = ("qwen3_moe", "mixtral")
STARTS = ("random", "seed")
QUICK_TOKENS = 200_000


def measure(cell: Cell, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One (cell, seed), in this process."""
    torch.set_num_threads(1)
    work = arguments.work / cell.slug / f"seed-{seed}"
    base = base_config(cell, seed, arguments.tokens, arguments.corpus, work)
    arms = asked(cell, arguments.arms)
    others = [name for name in arms if name not in (*BOTH, REFERENCE)]
    rows = compare(base, work, [name for name in arms if name in BOTH] or [REFERENCE], shell=InProcess())["rows"]
    if others:
        rows += compare(base, work, others, budgets=("tokens",), shell=InProcess())["rows"][1:]
    return {"cell": str(cell), "seed": seed, "rows": rows}


def run_process(cell: Cell, seed: int, arguments: argparse.Namespace) -> None:
    """One (cell, seed) as a process of its own; its result file is written when it is complete."""
    path = RESULTS / f"{cell.slug}-{seed}.json"
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        arms = {row["arm"] for row in there["rows"]}
        if there["setting"]["tokens"] == arguments.tokens and arms >= set(asked(cell, arguments.arms)):
            return
    started = time.time()
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    command = [
        sys.executable, __file__, "--worker", str(seed), "--cell", str(cell), "--tokens", str(arguments.tokens),
        "--work", str(arguments.work), "--arms", ",".join(arguments.arms), "--jobs", "1"]
    if arguments.corpus is not None:
        command += ["--corpus", str(arguments.corpus)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **threads})
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({
        **harness.environment(
            f"python benchmarks/quality/run.py --cell {cell} --seeds {arguments.seeds} --tokens {arguments.tokens}"),
        "setting": {"model": SIZES, "tokens": arguments.tokens, "seed": seed}, "seconds": round(time.time() - started, 1),
        **json.loads(done.stdout.strip().splitlines()[-1])}, indent=1) + "\n", encoding="utf-8")


def run_all(cells: list[Cell], arguments: argparse.Namespace) -> None:
    """Every cell with every seed, seed by seed, so that an interrupted grid has whole columns."""
    work = [(cell, seed) for seed in range(arguments.seeds) for cell in cells]
    hours = 15 * arguments.tokens * len(work) / arguments.speed / arguments.jobs / 3600
    print(f"{len(work)} (cell, seed) with {arguments.tokens:,} tokens each: about {hours:.1f} hours", file=sys.stderr)
    with ThreadPoolExecutor(arguments.jobs) as threads:
        for (cell, seed), _ in zip(work, threads.map(lambda one: run_process(*one, arguments), work), strict=True):
            print(f"{cell} seed {seed}: done", file=sys.stderr)
            write_summary()


def write_summary() -> None:
    """`results/summary.json` from whatever is finished."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json")) if path.stem != "summary"]
    (RESULTS / "summary.json").write_text(json.dumps(summarise(found), indent=1) + "\n", encoding="utf-8")


def quick(arguments: argparse.Namespace) -> int:
    """The default against the paper's recipe for as many dollars, on text that every installation has; 1 if the default loses."""
    torch.set_num_threads(1)
    work = arguments.work / "quick"
    base = base_config(Cell("embedded", "qwen3_moe", "random"), 0, QUICK_TOKENS, None, work)
    few_looks = base.evaluation.model_copy(update={"every_tokens": QUICK_TOKENS})
    base = base.model_copy(update={"evaluation": few_looks})
    result = compare(base, work, list(BOTH), budgets=("dollars",), shell=InProcess())
    output_console().print(compare_view(result))
    perplexity = {row["arm"]: row["perplexity"] for row in result["rows"]}
    won = perplexity["disco"] < perplexity["paper"]
    print(f"default {perplexity['disco']:.2f}, paper {perplexity['paper']:.2f}: the default {'wins' if won else 'LOSES'}")
    return 0 if won else 1


def asked(cell: Cell, arms: list[str]) -> list[str]:
    """The arms of a cell; from a seed, which is upcycled, upcycling is joint training."""
    return [name for name in arms if cell.start == "random" or name != "upcycle"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", type=Cell.parse, action="append", default=[], help="CORPUS/FAMILY/START; may be repeated")
    parser.add_argument("--grid", action="store_true", help="every corpus of --corpora, both families, both starts")
    parser.add_argument("--corpora", type=lambda text: text.split(","), default=["embedded"], help="of the grid")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=400_000, help="of joint training")
    parser.add_argument("--arms", type=lambda text: text.split(","), default=[name for name in ARMS if name != "joint-low"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--speed", type=float, default=7000, help="tokens per second of a core, for the estimate")
    parser.add_argument("--corpus", type=Path, default=os.environ.get("MOEDISCO_CORPORA"), help="folder of the corpora")
    parser.add_argument("--work", type=Path, default=Path("runs") / "quality", help="run directories, kept to go on from")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.corpus = Path(arguments.corpus) if arguments.corpus else None
    if arguments.quick:
        return quick(arguments)
    if arguments.worker is not None:
        print(json.dumps(measure(arguments.cell[0], arguments.worker, arguments)))
        return 0
    cells = [*arguments.cell, *(
        Cell(corpus, family, start) for corpus in arguments.corpora for family in FAMILIES for start in STARTS if arguments.grid)]
    if not cells:
        parser.error("name a --cell, or --grid, or --quick")
    run_all(cells, arguments)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
