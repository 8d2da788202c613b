"""The share of its time for which training stops to save, and how much saving slows it down:

none                    no checkpoint
disk, s3                the product: a copy in memory, which a thread writes to a local disk, or to an S3 server (moto)
                        on loopback
disk-waits, s3-waits    the same, but training waits until each checkpoint is safe

The last save is left out: no training continues during it.
Target: stalls of the product under 5 % of the time, at an interval shorter than the policy's shortest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import torch
import transformers

from benchmarks.harness import environment, figures, interleave, spread, spreads, write_result
from moedisco_ray.core.config import Architecture, Optimizer
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.store.locations import Location, joined
from moedisco_ray.models import ModelMap, config_values, hf_config, random_weights, submodel_config, write_checkpoint
from moedisco_ray.packed_tokens import write_packed
from moedisco_ray.stages.decompose import decompose
from moedisco_ray.training import TrainJob, World, loop, train
from moedisco_ray.training.checkpoints.checkpoint import Progress
from moedisco_ray.training.checkpoints.saver import Saver

SIZES = Architecture(
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    moe_intermediate_size=704,
    num_experts=4,
    num_experts_per_tok=2,
)
VOCABULARY, LENGTH, BATCH = 4096, 128, 8
STEPS, EVERY, WARM = 80, 20, 5
ARMS = ("none", "disk", "disk-waits", "s3", "s3-waits")
BUCKET = "stalls"


class Waits(Saver):
    """Saves, and continues when the checkpoint is safe."""

    def save(self, progress: Progress) -> None:
        super().save(progress)
        self._finish_upload()


def measured(arm: str, checkpoints: Location, scratch: Path) -> dict[str, Any]:
    config = config_values(hf_config("qwen3_moe", SIZES, VOCABULARY, LENGTH, 0))
    tensors = decompose(random_weights(config, 0), ModelMap("qwen3_moe"), SIZES.num_experts, SIZES.num_experts, 0)
    write_checkpoint(scratch / "start", tensors, submodel_config(config, 1))
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (STEPS + 4) * BATCH * LENGTH, dtype=np.int32)
    write_packed(scratch / "shards", [[tokens]], eos=0, vocab_size=VOCABULARY)
    times: list[float] = []
    saves: list[dict[str, float]] = []

    def note(event: Event) -> None:
        if event.type == "progress":
            times.append(time.perf_counter())
        elif event.type == "checkpoint":
            saves.append(event.data)

    if arm.endswith("-waits"):
        loop.Saver = Waits
    job = TrainJob(
        stage="submodels",
        name="submodel-0",
        model=scratch / "start",
        packed_dirs=(scratch / "shards",),
        output=scratch / "trained",
        checkpoints=checkpoints,
        steps=STEPS,
        sequence_length=LENGTH,
        log_every=1,
        checkpoint_every=STEPS if arm == "none" else EVERY,
        optimizer=Optimizer(lr=1e-4, batch_tokens=BATCH * LENGTH),
    )
    train(job, World(), note, lambda: False)
    seconds = times[-1] - times[WARM]
    beside = [save for save in saves if save["step"] < STEPS]
    return {
        "seconds": seconds,
        "stalled": sum(save["stall"] for save in beside) / seconds,
        "stall": statistics.median(save["stall"] for save in beside) if beside else 0.0,
        "latency": statistics.median(save["latency"] for save in beside) if beside else 0.0,
        "interval": seconds / (len(beside) + 1),
    }


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The URI of a bucket, in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "127.0.0.1:{1}".format(*free.getsockname())
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", address.partition(":")[2]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while server.poll() is None:
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", int(address.partition(":")[2])), 1),
            ):
                break
            time.sleep(0.1)
        boto3.client("s3", endpoint_url=f"http://{address}").create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}?endpoint_override={address}&scheme=http"
    finally:
        server.terminate()
        server.wait()


def _cell(results: Sequence[Mapping[str, Any]], undisturbed: Sequence[float]) -> dict[str, dict[str, float]]:
    slower = [seconds / alone - 1 for seconds, alone in zip(figures(results, "seconds"), undisturbed, strict=True)]
    return {**spreads(results, ("stalled", "stall", "latency", "interval")), "slower": spread(slower)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--storage")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.arm:
        transformers.logging.set_verbosity_error()
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            on_s3 = arguments.arm.startswith("s3")
            checkpoints = joined(arguments.storage, scratch.name) if on_s3 else scratch / "steps"
            print(json.dumps(measured(arguments.arm, checkpoints, scratch)))
        return
    with s3_server() as storage:
        rounds = interleave(__spec__.name, ARMS, arguments.rounds, "--storage", storage)
    undisturbed = figures(rounds["none"], "seconds")
    write_result(
        "checkpoint_stall",
        {
            **environment("python -m benchmarks.checkpoint_stall"),
            "setting": {
                "architecture": SIZES.model_dump(),
                "vocabulary": VOCABULARY,
                "sequence_length": LENGTH,
                "batch": BATCH,
                "steps": STEPS,
                "checkpoint_every": EVERY,
                "warm_up_steps": WARM,
                "threads": 1,
                "rounds": arguments.rounds,
                "seed": 0,
            },
            "arms": {arm: _cell(results, undisturbed) for arm, results in rounds.items() if arm != "none"},
            "targets": {"stalled": 0.05},
        },
    )


if __name__ == "__main__":
    main()
