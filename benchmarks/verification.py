"""What checksums cost: a commit of 2 GB of weights, a read of them, and a short training stage.

rename        files are written and their folder is renamed, without checksums and without waiting for the disk
commit        the product: checksums of all files, files on the disk before the rename
verify        the product: all files read again and compared with their checksums
stage         the product's training of a small model: the part of its time in which its output is committed

The stage trains 0.02 tokens per weight, a thousandth of what trainings usually take, so its share is an upper bound.
Targets: at most 2 % of a training stage, and 1 s per GB that is read.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import checkpoint_stall
from benchmarks.harness import by_arm, environment, figures, interleave, spread, write_result
from moedisco_ray.core.store.artifacts import OnDisk, replace_directory, versions
from moedisco_ray.core.store.verification import Verifier

FILES, FILE_BYTES = 8, 250_000_000
ARMS = ("rename", "commit", "verify", "stage")
TARGETS = {"stage": 0.02, "verify": 1.0}


def measured(arm: str, scratch: Path) -> dict[str, Any]:
    if arm == "stage":
        return stage(scratch)
    draft, directory = scratch / ".weights.draft", scratch / "weights"
    draft.mkdir()
    piece = os.urandom(FILE_BYTES // 10)
    started = time.perf_counter()
    for number in range(FILES):
        with (draft / f"model-{number}.safetensors").open("wb") as file:
            for _ in range(10):
                file.write(piece)
    if arm == "rename":
        replace_directory(draft, directory)
        return {"seconds": time.perf_counter() - started}
    OnDisk().replace(draft, directory, {})
    if arm == "verify":
        started = time.perf_counter()
        Verifier().verify(directory)
    return {"seconds": time.perf_counter() - started}


def stage(scratch: Path) -> dict[str, Any]:
    """Share of the commit of a training's output in the training's time."""
    spent: list[float] = []
    replace = OnDisk.replace

    def timed(self: OnDisk, *arguments: Any) -> None:
        started = time.perf_counter()
        replace(self, *arguments)
        spent.append(time.perf_counter() - started)

    OnDisk.replace = timed  # type: ignore[method-assign]
    started = time.perf_counter()
    checkpoint_stall.measured("none", scratch / "steps", scratch)
    return {"seconds": time.perf_counter() - started, "share": sum(spent) / (time.perf_counter() - started)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.arm:
        transformers.logging.set_verbosity_error()
        torch.set_num_threads(1)
        versions()  # the first call takes a while, and is no part of a commit
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measured(arguments.arm, Path(folder))))
        return
    rounds = interleave(__spec__.name, ARMS, arguments.rounds)
    seconds = by_arm(rounds, "seconds")
    gigabytes = FILES * FILE_BYTES / 1e9
    write_result(
        "verification",
        {
            **environment("python -m benchmarks.verification"),
            "setting": {
                "files": FILES,
                "gigabytes": gigabytes,
                "steps": checkpoint_stall.STEPS,
                "rounds": arguments.rounds,
            },
            "seconds": {arm: spread(found) for arm, found in seconds.items()},
            "commit_per_gb": spread(
                [(ours - plain) / gigabytes for ours, plain in zip(seconds["commit"], seconds["rename"], strict=True)]
            ),
            "verify_per_gb": spread([found / gigabytes for found in seconds["verify"]]),
            "stage_share": spread(figures(rounds["stage"], "share")),
            "targets": TARGETS,
        },
    )


if __name__ == "__main__":
    main()
