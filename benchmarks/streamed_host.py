"""Host memory of streamed training per parameter, on a model of 0.7 billion parameters in bf16, against the plan.

On a CPU, the device's memory is the host's: the plan is that of both together. Memory is the process's own, without
pages of mapped files, from before the training begins.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import by_arm, environment, interleave, ratios, spread, write_result
from benchmarks.true_sizes import Noise, own_mb, own_memory
from moedisco_ray.core.config import Architecture, Optimizer, Residence
from moedisco_ray.core.records.events import Event
from moedisco_ray.models import Stored, canonical_shapes, config_values, hf_config, write_checkpoint
from moedisco_ray.packed_tokens import write_packed
from moedisco_ray.plan.streamed_memory import streamed_memory
from moedisco_ray.training import TrainJob, World, train

FAMILY, VOCABULARY, LENGTH, SEQUENCES, STEPS = "olmoe", 32_000, 128, 2, 2
SIZES = {
    "hidden_size": 1024,
    "num_hidden_layers": 10,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "moe_intermediate_size": 512,
    "num_experts": 40,
    "num_experts_per_tok": 2,
}
RECIPE = Optimizer(name="adamw", precision="pure_bf16", batch_tokens=LENGTH * SEQUENCES, micro_batch=1)
"""AdamW: Muon's products would take minutes on one core. Its state is counted in the same way."""
ARMS = ("streamed",)
TARGET = 0.05


def architecture() -> Architecture:
    return Architecture.model_validate({**SIZES, "norm_topk_prob": False})


def prepare(home: Path) -> None:
    config = config_values(hf_config(FAMILY, architecture(), VOCABULARY, LENGTH, 0))
    shapes = canonical_shapes(config)
    layout = {key: Stored(shape, torch.bfloat16) for key, shape in shapes.items()}
    write_checkpoint(home / "model", Noise(shapes, 0).items(), config, layout=layout)
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, LENGTH * 20)
    write_packed(home / "tokens", [[tokens]], 0, VOCABULARY)


def measure(home: Path, arm: Residence) -> dict[str, float]:
    """Largest own memory of a training, per parameter; and the planned one."""
    plan = streamed_memory(FAMILY, architecture(), VOCABULARY, RECIPE, sequence_length=LENGTH, gpu=0)
    job = TrainJob(
        stage="finetune",
        name=arm,
        model=home / "model",
        packed_dirs=(home / "tokens",),
        output=home / f"{arm}-out",
        checkpoints=home / f"{arm}-steps",
        steps=STEPS,
        sequence_length=LENGTH,
        optimizer=RECIPE,
        checkpoint_every=None,
        memory=arm,
    )
    before = own_mb()
    with own_memory() as peak:
        train(job, World(), _ignore, lambda: False)
    parameters = plan.streamed / 2
    return {
        "bytes_per_parameter": (peak[0] - before) * 2**20 / parameters,
        "planned": (plan.host + plan.total - plan.overhead) / parameters,
        "planned_of_host": plan.host / parameters,
        "parameters": parameters,
    }


def _ignore(event: Event) -> None:
    del event


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=["prepare", *ARMS])
    parser.add_argument("--home", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.arm == "prepare":
        prepare(arguments.home)
        print(json.dumps({}))
        return
    if arguments.arm:
        torch.set_num_threads(1)
        print(json.dumps(measure(arguments.home, arguments.arm)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.home) as scratch:
        interleave(__spec__.name, ["prepare"], 1, "--home", scratch)
        arms = interleave(__spec__.name, ARMS, arguments.rounds, "--home", scratch)
    found, planned = (by_arm(arms, name) for name in ("bytes_per_parameter", "planned"))
    write_result(
        "streamed_host",
        {
            **environment("python -m benchmarks.streamed_host"),
            "setting": {
                "family": FAMILY,
                **SIZES,
                "vocabulary": VOCABULARY,
                "parameters": arms["streamed"][0]["parameters"],
                "tokens": LENGTH * SEQUENCES,
                "rounds": arguments.rounds,
            },
            "target": TARGET,
            "bytes_per_parameter": {arm: spread(values) for arm, values in found.items()},
            "planned": arms["streamed"][0]["planned"],
            "planned_of_host": arms["streamed"][0]["planned_of_host"],
            "over_plan": ratios(found["streamed"], planned["streamed"]),
        },
    )


if __name__ == "__main__":
    main()
