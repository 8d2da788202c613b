"""Memory of two training steps of a published checkpoint's sub-model on FakeTensors, with few layers and with all.

One process of `benchmarks.fake_memory`: its last line of output is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from fake_steps import PUBLISHED, SEQUENCE, measured, path_of_gpus

from moedisco_ray.core.config import Architecture, Lora, Optimizer
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.plan.memory import worker_memory
from moedisco_ray.plan.parameters import submodel_architecture

EXPERTS, SEQUENCES = 4, 2
"""Experts of the sub-model, and sequences of a step."""


def measure(checkpoint: str, changes: dict[str, Any], *, whole: bool) -> dict[str, Any]:
    """Bytes by the formulas and by steps with a few layers, and processor seconds; with all layers too if `whole`."""
    family, vocabulary, sizes = PUBLISHED[checkpoint]
    sizes = submodel_architecture(family, sizes, sizes.num_experts // EXPERTS)
    adapters = {name: value for name, value in changes.items() if name in ("rank", "base")}
    lora = Lora(**adapters) if adapters else None
    recipe = Optimizer(
        batch_tokens=SEQUENCES * SEQUENCE, **{name: value for name, value in changes.items() if name not in adapters}
    )

    def steps(layers: int) -> tuple[dict[str, int], float]:
        began = time.process_time()
        peaks = measured(family, sizes.model_copy(update={"num_hidden_layers": layers}), vocabulary, recipe, lora)
        return peaks, time.process_time() - began

    few = fewest_layers(checkpoint, sizes)
    (first, first_seconds), (second, second_seconds) = steps(few), steps(few + 1)
    plan = worker_memory(family, sizes, vocabulary, recipe, sequence_length=SEQUENCE, gpu=1, lora=lora)
    found = {
        "layers": sizes.num_hidden_layers,
        "few_layers": [few, few + 1],
        "formulas": plan.total - plan.overhead,
        "scaled": scaled(first, second, sizes.num_hidden_layers - few),
        "scaled_peak": max(first.values())
        + (sizes.num_hidden_layers - few) * (max(second.values()) - max(first.values())),
        "seconds_of_few_layers": first_seconds + second_seconds,
    }
    if whole:
        peaks, seconds = steps(sizes.num_hidden_layers)
        found |= {"all_layers": max(peaks.values()), "seconds_of_all_layers": seconds}
    return found


def fewest_layers(checkpoint: str, sizes: Architecture) -> int:
    """Layers of the smallest model that has all kinds of layers; one more layer is of the most frequent kind."""
    return max(2, 1 + DECLARATIONS[PUBLISHED[checkpoint][0]].dense_layers(sizes.fields))


def scaled(first: dict[str, int], second: dict[str, int], more: int) -> int:
    """Peak of a model with `more` layers than the first, if each takes as much as the second's additional layer."""
    return max(first[moment] + more * (second[moment] - first[moment]) for moment in first if moment != "other layers")


def trial(checkpoint: str, changes: dict[str, Any], *, whole: bool) -> dict[str, Any]:
    """What `measure` finds, or why FakeTensors cannot take the steps."""
    try:
        found = measure(checkpoint, changes, whole=whole)
    except RuntimeError as error:
        found = {"refused": str(error).partition("\n")[0]}
    sys.stderr.write(f"{changes}: {found}\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", help="a published checkpoint")
    parser.add_argument("--settings", type=json.loads, help="a list of optimizer settings")
    parser.add_argument("--few", action="store_true", help="no step with all layers")
    arguments = parser.parse_args()
    with path_of_gpus():
        found = [trial(arguments.arm, each, whole=not arguments.few) for each in arguments.settings]
    sys.stdout.write(f"{json.dumps(found)}\n")


if __name__ == "__main__":
    main()
