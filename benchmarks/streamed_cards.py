"""Seconds of a streamed step that two threads of a CPU divide as two cards would, against one thread and the plan.

Nothing is copied over a slot here. What is measured is the division: whether a card waits for the other one, and what
handing on hidden states and gradients takes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import by_arm, environment, interleave, ratios, spread, write_result
from benchmarks.true_sizes import Noise
from moedisco_ray.core.config import Architecture, Optimizer
from moedisco_ray.core.records.events import Event
from moedisco_ray.models import Stored, canonical_shapes, config_values, hf_config, write_checkpoint
from moedisco_ray.packed_tokens import write_packed
from moedisco_ray.plan.streaming import Host, step_time, step_work
from moedisco_ray.training import TrainJob, World, devices_of, train

FAMILY, VOCABULARY, LENGTH, SEQUENCES, STEPS = "olmoe", 8_000, 256, 32, 4
SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 256,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
RECIPE = Optimizer(name="muon", precision="fp32", batch_tokens=LENGTH * SEQUENCES, micro_batch=2)
ARMS = ("1", "2")
TARGET = 0.9
"""Least speed-up by two cards, relative to the planned one."""
_FLOPS = 3e10
"""Operations per second of a thread; without copies, the planned speed-up does not depend on it."""


def architecture() -> Architecture:
    return Architecture.model_validate({**SIZES, "norm_topk_prob": False})


def prepare(home: Path) -> None:
    config = config_values(hf_config(FAMILY, architecture(), VOCABULARY, LENGTH, 0))
    shapes = canonical_shapes(config)
    layout = {key: Stored(shape, torch.bfloat16) for key, shape in shapes.items()}
    write_checkpoint(home / "model", Noise(shapes, 0).items(), config, layout=layout)
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, LENGTH * SEQUENCES * (STEPS + 2))
    write_packed(home / "tokens", [[tokens]], 0, VOCABULARY)


def measure(home: Path, cards: int) -> dict[str, float]:
    """Median time of a step after the first one."""
    seconds: list[float] = []

    def note(event: Event) -> None:
        if event.type == "progress":
            seconds.append(event.data["tokens_per_second"])

    made = Path(tempfile.mkdtemp(dir=home))  # a training that has ended is not repeated
    job = TrainJob(
        stage="finetune",
        name=f"cards-{cards}",
        model=home / "model",
        packed_dirs=(home / "tokens",),
        output=made / "out",
        checkpoints=made / "steps",
        steps=STEPS,
        sequence_length=LENGTH,
        optimizer=RECIPE,
        checkpoint_every=None,
        memory="streamed",
        load_balance=0.01,
        z_loss=0.001,
        log_every=1,
    )
    train(job, World(devices=devices_of("cpu", cards)), note, lambda: False)
    return {"seconds": RECIPE.batch_tokens / statistics.median(seconds[1:])}


def planned() -> float:
    """The speed-up by two cards that copy in no time."""
    work = step_work(FAMILY, architecture(), VOCABULARY, RECIPE, sequence_length=LENGTH, gpu=0)
    host = Host(math.inf, math.inf, math.inf, math.inf, math.inf)
    one, two = (step_time(work, _FLOPS, host, cards=cards, division="layers").seconds for cards in (1, 2))
    return one / two


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=["prepare", *ARMS])
    parser.add_argument("--home", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.arm == "prepare":
        prepare(arguments.home)
        print(json.dumps({}))
        return
    if arguments.arm:
        torch.set_num_threads(1)
        print(json.dumps(measure(arguments.home, int(arguments.arm))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.home) as scratch:
        interleave(__spec__.name, ["prepare"], 1, "--home", scratch)
        arms = interleave(__spec__.name, ARMS, arguments.rounds, "--home", scratch)
    found = by_arm(arms, "seconds")
    write_result(
        "streamed_cards",
        {
            **environment("python -m benchmarks.streamed_cards"),
            "setting": {
                "family": FAMILY,
                **SIZES,
                "vocabulary": VOCABULARY,
                "tokens": LENGTH * SEQUENCES,
                "micro_batches": SEQUENCES // (RECIPE.micro_batch or SEQUENCES),
                "rounds": arguments.rounds,
            },
            "target": TARGET,
            "seconds": {arm: spread(values) for arm, values in found.items()},
            "speed_up": ratios(found["1"], found["2"]),
            "planned": planned(),
        },
    )


if __name__ == "__main__":
    main()
