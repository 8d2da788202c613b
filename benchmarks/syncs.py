"""One sync of many members on files, next to that of another commit: seconds per member, slope, memory of the head.

    git worktree add --detach ../old COMMIT && make -C ../old .venv/.installed
    python -m benchmarks.syncs --old ../old --folder ../syncs

An arm is a process of its own, the head. Each part of a member's work is measured in a process that the head starts
for it, one after the other, as if each member had a machine to itself. Weights are float32. The sync that is measured
is the second one, which has momentum. `old`: the head combines the weights. `new`: members combine ranges.

A sync takes as long as the slowest member publishes, plus what the head does, plus the slowest range, plus the slowest
load. Files are read from the page cache, so the seconds are of the processor, and of the disk that is written to. What
a network adds follows from the bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import environment, write_result
from benchmarks.sync_section import PARTS
from moedisco_ray.core.config import Optimizer, Outer
from moedisco_ray.models import write_checkpoint
from moedisco_ray.policies.sync_points import SyncMembers
from moedisco_ray.training import SyncPlan, TrainJob

CONFIG = {"model_type": "qwen3_moe", "tie_word_embeddings": False}
OUTER = Outer(lr=0.7, momentum=0.9)
NETWORK = 125e6
"""Speed of a machine's network (bytes/s): 1 Gbit/s."""
LAYERS, WIDTH, LOADS = 14, 512, 3
Figures = dict[str, float]


def weights(megabytes: int, moved: float) -> dict[str, Tensor]:
    """16 equal tensors under names of a family, moved by one amount."""
    rows = megabytes * 1_000_000 // (4 * WIDTH * (LAYERS + 2))
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.self_attn.q_proj.weight" for i in range(LAYERS))]
    start = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0))
    return {name: start + (i + moved) for i, name in enumerate([*names, "lm_head.weight"])}


def apart(function: Callable[[dict[str, Tensor]], Any], megabytes: int, moved: float = 0.0) -> tuple[Any, Figures]:
    """Result of a function of a member's weights, in a process of its own, and what it took there."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def work() -> None:
        given, figures = weights(megabytes, moved), Figures()
        with measured(figures):
            found = function(given)
        sender.send((found, figures))

    process = context.Process(target=work)
    process.start()
    result: tuple[Any, Figures] = receiver.recv()
    process.join()
    return result


@contextlib.contextmanager
def measured(figures: Figures) -> Iterator[None]:
    """Add to the figures what the block takes: seconds, bytes of files, and the largest memory that it adds."""
    ended, looked, peak, before = threading.Event(), [0], [0.0], resident(status())

    def look() -> None:
        while not ended.wait(0.01):
            found = status()
            looked[0] += len(found)
            peak[0] = max(peak[0], resident(found) - before)

    thread = threading.Thread(target=look)
    thread.start()
    read, written = transferred()
    started, spent = time.perf_counter(), time.process_time()
    yield
    found = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - spent}
    peak[0] = max(peak[0], resident(status()) - before)
    ended.set()
    thread.join()
    after = transferred()
    found |= {"read": after[0] - read - looked[0], "written": after[1] - written}
    for name, value in found.items():
        figures[name] = figures.get(name, 0.0) + value
    figures["memory_mb"] = max(figures.get("memory_mb", 0.0), peak[0])


def transferred() -> tuple[int, int]:
    """Bytes that this process has read from files and written to files, without those of mapped files."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"]), int(fields["wchar"])


def status() -> str:
    return Path("/proc/self/status").read_text()


def resident(found: str) -> float:
    """Memory of this process in MB, without mapped files."""
    return float(dict(line.split(":", 1) for line in found.splitlines())["RssAnon"].split()[0]) / 1000


def slowest(parts: Sequence[Figures]) -> Figures:
    """The largest of each figure over all members."""
    largest: Figures = {}
    for part in parts:
        for name, value in part.items():
            largest[name] = max(value, largest.get(name, value))
    return largest


def measure_old(folder: Path, members: int, megabytes: int) -> dict[str, Any]:
    """The head reads the weights of all members from mapped files, and writes common weights and momentum."""
    exchange: Any = importlib.import_module("moedisco_ray.training.sync.exchange")
    write_checkpoint(folder / "start", weights(megabytes, 0.0).items(), CONFIG)
    names = [f"member-{k:02d}" for k in range(members)]
    sync, head, size = folder / "sync", Figures(), 1_000_000 * megabytes

    def publish(number: int, k: int) -> Figures:
        record = exchange.MemberRecord(number, 100 + k)
        return apart(
            lambda given: exchange.publish(sync, number, names[k], given.items(), CONFIG, record), megabytes, 1e-3 * k
        )[1]

    def load(given: dict[str, Tensor]) -> None:
        for name, tensor in exchange.open_common(sync, 2).items():
            given[name].copy_(tensor)

    publish(1, 0)
    exchange.combine(sync, 1, folder / "start", SyncMembers((names[0],)), OUTER)
    published = [publish(2, k) for k in range(members)]
    with measured(head):
        exchange.combine(sync, 2, folder / "start", SyncMembers(tuple(names)), OUTER)
    loaded = [apart(load, megabytes)[1] for _ in range(LOADS)]
    # what is read from mapped files: the members, the last common weights and momentum twice, the new momentum
    head["read"] += (members + 5) * size
    return {
        "publish": slowest(published),
        "load": slowest([{**each, "read": each["read"] + size} for each in loaded]),
        "head": head,
        "digest": digest_of(exchange.open_common(sync, 2).values()),
    }


def measure_new(folder: Path, members: int, megabytes: int) -> dict[str, Any]:
    """Members combine a range each; the head records who they are, and that they are done."""
    combining: Any = importlib.import_module("moedisco_ray.training.sync.combine")
    files: Any = importlib.import_module("moedisco_ray.training.sync.files")
    layouts: Any = importlib.import_module("moedisco_ray.training.sync.layout")
    coordinators: Any = importlib.import_module("moedisco_ray.training.sync.coordinator")
    board = importlib.import_module("moedisco_ray.execution.sync_board").SyncBoard()
    names = [f"member-{k:02d}" for k in range(members)]
    first, second = (files.SyncPoint(folder / "sync", number) for number in (1, 2))
    head = Figures()

    def publish(point: Any, k: int) -> tuple[Any, Figures]:
        return apart(lambda given: point.publish(names[k], given, members, 100 + k), megabytes, 1e-3 * k)

    def combine(point: Any, *places: int) -> tuple[Any, Figures]:
        def work(given: dict[str, Tensor]) -> Any:
            entries, roster, layout = {}, point.roster(), layouts.Layout.of(given)
            for place in places:
                entries |= combining.combine(point, place, roster, layout, given, OUTER, CONFIG)
            return entries

        return apart(work, megabytes)

    def load(given: dict[str, Tensor]) -> None:
        for name, tensor in combining.common_tensors(second):
            given[name].copy_(tensor)

    roster = first.record_roster(SyncMembers((names[0],)), {names[0]: publish(first, 0)[0]}, members)
    first.complete(roster, combine(first, *range(members))[0])

    jobs = [job_of(name, SyncPlan(folder / "sync", (1, 2), OUTER, ranges=members), folder) for name in names]
    coordinator = coordinators.SyncCoordinator(jobs, board, lambda _event: None)
    published, combined = [publish(second, k) for k in range(members)], []
    with measured(head):
        for arrival, _ in published:
            board.arrive(arrival)
        coordinator.advance()
    for name in names:
        place = board.turn(name, 2).number
        made, figures = combine(second, place)
        combined.append(figures)
        board.finish(2, place, made)
    with measured(head):
        coordinator.advance()
    return {
        "publish": slowest([figures for _, figures in published]),
        "combine": slowest(combined),
        "load": slowest([apart(load, megabytes)[1] for _ in range(LOADS)]),
        "head": head,
        "digest": digest_of(tensor for _, tensor in combining.common_tensors(second)),
    }


def job_of(name: str, plan: SyncPlan, folder: Path) -> TrainJob:
    return TrainJob(
        stage="seed",
        name=name,
        model=folder / "start",
        packed_dirs=(),
        output=folder / name,
        checkpoints=folder / f"{name}-steps",
        steps=3,
        sequence_length=1,
        optimizer=Optimizer(),
        checkpoint_every=1,
        sync=plan,
    )


def digest_of(tensors: Iterable[Tensor]) -> str:
    """Digest of all bits of some tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def in_all(result: Mapping[str, Any]) -> dict[str, float]:
    """What a sync takes on machines of their own: from the parts measured here, and from bytes at 1 Gbit/s."""
    member = [result[part] for part in ("publish", "combine", "load") if part in result]
    parts = [*member, result["head"]]
    return {
        "seconds": sum(part["seconds"] for part in parts),
        "network_seconds": sum(part["read"] + part["written"] for part in parts) / NETWORK,
        "member_mb": sum(part["read"] + part["written"] for part in member) / 1e6,
        "member_cpu_seconds": sum(part["cpu_seconds"] for part in member),
        "head_mb": (result["head"]["read"] + result["head"]["written"]) / 1e6,
        "head_memory_mb": result["head"]["memory_mb"],
    }


def run_arm(arm: str, root: Path, members: int, megabytes: int, folder: Path | None) -> dict[str, Any]:
    """Run this file with the code of a checkout."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        done = subprocess.run(
            [str(root / ".venv/bin/python"), __file__, "--arm", arm, str(members), str(megabytes), scratch],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env={**os.environ, **threads, "PYTHONPATH": str(root.resolve()), "PYTHONWARNINGS": "ignore"},
        )
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def cell(members: int, megabytes: int, roots: Mapping[str, Path], folder: Path | None) -> dict[str, Any]:
    found = {arm: run_arm(arm, root, members, megabytes, folder) for arm, root in roots.items()}
    print(f"{members} x {megabytes} MB: {found}", file=sys.stderr)
    return {
        "members": members,
        "megabytes": megabytes,
        "equal_bits": len({result["digest"] for result in found.values()}) == 1,
        **{arm: published(result) for arm, result in found.items()},
    }


def published(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the document shows of an arm: the seconds of each part, and all parts together."""
    parts = {part: {"seconds": result[part]["seconds"]} for part in PARTS if part in result}
    return {**parts, "all": in_all(result)}


def slopes(cells: Sequence[Mapping[str, Any]], arm: str) -> Figures:
    return {name: slope(cells, arm, name) for name in ("seconds", "network_seconds", "head_memory_mb")}


def slope(cells: Sequence[Mapping[str, Any]], arm: str, name: str) -> float:
    """Change of a figure per further member, by least squares."""
    pairs = [(each["members"], each[arm]["all"][name]) for each in cells]
    middle = [sum(values) / len(pairs) for values in zip(*pairs, strict=True)]
    above = sum((x - middle[0]) * (y - middle[1]) for x, y in pairs)
    return above / sum((x - middle[0]) ** 2 for x, _ in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", nargs=4, metavar=("ARM", "MEMBERS", "MEGABYTES", "FOLDER"), help="measure here")
    parser.add_argument("--old", type=Path, help="checkout of the other commit")
    parser.add_argument("--members", type=int, nargs="*", default=[8, 16, 32, 64], help="with weights of 64 MB each")
    parser.add_argument("--large", type=int, default=1000, help="MB of weights, of 8 members")
    parser.add_argument("--folder", type=Path, help="where weights are written: 12 GB")
    arguments = parser.parse_args()
    if arguments.arm:
        arm, members, megabytes, folder = arguments.arm
        torch.set_num_threads(1)
        measure = {"old": measure_old, "new": measure_new}[arm]
        print(json.dumps(measure(Path(folder), int(members), int(megabytes))))
        return
    roots = {"old": arguments.old, "new": Path(__file__).parents[1]}
    shown = [f"../{Path(each).name}" if Path(each).is_dir() else each for each in sys.argv[1:]]
    same_size = [cell(members, 64, roots, arguments.folder) for members in arguments.members]
    result = {
        **environment(shlex.join(["python", "-m", "benchmarks.syncs", *shown])),
        "cells": [*same_size, cell(8, arguments.large, roots, arguments.folder)],
        "slopes": {arm: slopes(same_size, arm) for arm in roots},
    }
    write_result("syncs", result)


if __name__ == "__main__":
    main()
