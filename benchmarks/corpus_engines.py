"""The corpus stage on Ray next to that of another commit: speed, memory, spilling, and whether the bytes are equal.

    git worktree add --detach ../old COMMIT && make -C ../old .venv/.installed
    python -m benchmarks.corpus_engines --old ../old --folder ../texts
    python -m benchmarks.corpus_engines --blocks 1 7 200 --folder ../texts

Without another commit, it compares the bytes that several numbers of blocks give. An arm, `old` or `new`, is a process
of its own with a local Ray of two CPUs. It makes a corpus of 2 MB first, which starts Ray's processes, and then the one
that is measured. CPU time is that of the driver and of Ray's processes together.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import logging
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from benchmarks.corpus_scale import VOCABULARY, peak_mb, sentences, write_corpus
from benchmarks.harness import environment, figures, ratios, spreads, write_result
from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.execution.ray.corpus import build_corpus
from moedisco_ray.stages.text.tokenizer import save_trained, train_bpe

MEASURED = (
    "seconds",
    "mb_per_second",
    "mb_per_cpu_second",
    "start_seconds",
    "start_cpu_seconds",
    "driver_peak_mb",
    "spilled_mb",
)
_FILE_DOCUMENTS = 250_000
_TICKS = os.sysconf("SC_CLK_TCK")


def write_short_documents(directory: Path, count: int) -> None:
    """JSON Lines of short documents: about 150 bytes each, and every twentieth occurs twice."""
    generator = np.random.default_rng(0)
    words = next(sentences(0)).split()
    for number, start in enumerate(range(0, count, _FILE_DOCUMENTS)):
        chosen = generator.integers(0, len(words), (min(_FILE_DOCUMENTS, count - start), 22))
        with (directory / f"short-{number:03d}.jsonl").open("w", encoding="utf-8") as file:
            for i, row in enumerate(chosen, start):
                text = json.dumps({"text": f"{i} " + " ".join(words[word] for word in row)}) + "\n"
                file.write(text if i % 20 else 2 * text)


def cpu_seconds() -> float:
    """CPU time of this process and of all processes below it, including those that have ended."""
    parents: dict[int, int] = {}
    spent: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            parents[int(path.name)] = int(fields[1])
            spent[int(path.name)] = sum(map(int, fields[11:15])) / _TICKS
    return sum(seconds for process, seconds in spent.items() if os.getpid() in _above(process, parents))


def _above(process: int, parents: dict[int, int]) -> Iterator[int]:
    while process in parents:
        yield process
        process = parents[process]


def measure(text: Path, blocks: int | None) -> dict[str, Any]:
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "false"}},
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(dir=text.parent) as scratch:
        first = Path(scratch) / "first"
        for folder in (first / "text", first / "made", Path(scratch) / "made"):
            folder.mkdir(parents=True)
        write_corpus(first / "text", 2_000_000)
        before, started = cpu_seconds(), time.perf_counter()
        build_corpus(config_of(first / "text", text.parent / "tokenizer"), first / "made", blocks)
        start_seconds, start_cpu = time.perf_counter() - started, cpu_seconds() - before
        before, started = cpu_seconds(), time.perf_counter()
        summary = build_corpus(config_of(text, text.parent / "tokenizer"), Path(scratch) / "made", blocks)
        seconds, cpu = time.perf_counter() - started, cpu_seconds() - before
        stored = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats
        megabytes = sum(path.stat().st_size for path in text.iterdir()) / 1e6
        return {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "mb_per_second": megabytes / seconds,
            "mb_per_cpu_second": megabytes / cpu,
            "start_seconds": start_seconds,
            "start_cpu_seconds": start_cpu,
            "driver_peak_mb": peak_mb(),
            "spilled_mb": stored.spilled_bytes_total / 1e6,
            "tokens": summary["tokens"],
            "documents": summary["documents"],
            "digest": digest(Path(scratch) / "made"),
        }


def config_of(text: Path, tokenizer: Path) -> RunConfig:
    return check_config(
        {
            "name": "engines",
            "corpus": {"sources": [{"path": str(text)}], "sequence_length": 1024},
            "tokenizer": {"path": str(tokenizer)},
            "clusters": {"count": 2},
        }
    )


def digest(directory: Path) -> str:
    """Digest of the names and contents of all files."""
    found = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        found.update(str(path.relative_to(directory)).encode() + path.read_bytes())
    return found.hexdigest()[:16]


def run_arm(root: Path, text: Path, blocks: int) -> dict[str, Any]:
    """Run this file with the code of a checkout."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    done = subprocess.run(
        # Ray's workers import from the working directory, and what is installed.
        [str(root / ".venv/bin/python"), __file__, "--arm", str(text), "--blocks", str(blocks)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, **threads, "PYTHONPATH": str(root.resolve()), "PYTHONWARNINGS": "ignore"},
    )
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def cell(kind: str, size: int, blocks: int, rounds: int, roots: dict[str, Path], folder: Path | None) -> dict[str, Any]:
    """Measure the arms in turn on the same texts."""
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in roots}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        text = Path(scratch) / "text"
        text.mkdir()
        write_corpus(text, size * 1_000_000) if kind == "megabytes" else write_short_documents(text, size)
        save_trained(train_bpe(itertools.islice(sentences(1), 2000), VOCABULARY), text.parent / "tokenizer")
        for arm, root in [*roots.items()] * rounds:
            found[arm].append(run_arm(root, text, blocks))
            print(f"{size} {kind}, {arm}: {found[arm][-1]}", file=sys.stderr)
    digests = {result["digest"] for results in found.values() for result in results}
    cell = {kind: size, "blocks": blocks, "equal_bytes": len(digests) == 1, "digests": sorted(digests)}
    if "old" not in found:
        return {**cell, **{name: statistics.median(figures(found["new"], name)) for name in MEASURED}}
    compared = {each: new_over_old(found, each) for each in ("mb_per_second", "mb_per_cpu_second")}
    return {**cell, "new_over_old": compared, **{arm: spreads(results, MEASURED) for arm, results in found.items()}}


def new_over_old(found: dict[str, list[dict[str, Any]]], figure: str) -> dict[str, float]:
    """The ratios of one figure of both arms, round by round."""
    return ratios([result[figure] for result in found["new"]], [result[figure] for result in found["old"]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", type=Path, help="measure in this process; the texts, next to which the tokenizer is")
    parser.add_argument("--old", type=Path, help="checkout of the other commit")
    parser.add_argument("--blocks", type=int, nargs="*", default=[0], help="tasks that read; 0: one per 64 MB")
    parser.add_argument("--megabytes", type=int, nargs="*", default=[100])
    parser.add_argument("--documents", type=int, nargs="*", default=[500_000])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where texts and corpora are written")
    arguments = parser.parse_args()
    if arguments.arm:
        print(json.dumps(measure(arguments.arm, arguments.blocks[0] or None)))
        return
    roots = {"new": Path(__file__).parents[1]}
    if arguments.old:
        roots = {"old": arguments.old, **roots}
    shown = [f"../{Path(each).name}" if Path(each).is_dir() else each for each in sys.argv[1:]]
    result: dict[str, Any] = {
        **environment(shlex.join(["python", "-m", "benchmarks.corpus_engines", *shown])),
        "targets": {"new_over_old": 0.8, "driver_peak_mb": 1000},
        "cells": [],
    }
    for kind, sizes in (("megabytes", arguments.megabytes), ("documents", arguments.documents)):
        for size, blocks in itertools.product(sizes, arguments.blocks):
            result["cells"].append(cell(kind, size, blocks, arguments.rounds, roots, arguments.folder))
            write_result("corpus_engines" if arguments.old else "corpus_blocks", result)


if __name__ == "__main__":
    main()
