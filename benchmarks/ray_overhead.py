"""What Ray adds to the demo: the same run on a local Ray and in one plain process, stage by stage.

Both make the same artifacts, bit for bit. The plain process trains one sub-model after the other; Ray trains as many at
once as the machine has cores, so its submodels stage can be faster than the plain one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

import torch
import yaml

from benchmarks.harness import differences, environment, figures, interleave, spreads, write_result
from moedisco_ray.core.config import check_config
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.store.artifacts import read_manifest
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend


def smaller(tokens: int) -> dict[str, Any]:
    section = yaml.safe_load(preset_text("demo"))["tokens"]
    return {"tokens": {**section, "total": tokens}}


def measure(arm: str, tokens: int) -> dict[str, float]:
    """Seconds per stage, and of the whole; what is in no stage is starting and stopping Ray."""
    torch.set_num_threads(1)
    backend = LocalBackend() if arm == "plain" else None
    whole: list[float] = []

    def listen(event: Event) -> None:
        if event.type == "run_finished":
            whole.append(event.data["seconds"])

    with tempfile.TemporaryDirectory() as scratch:
        config = check_config({**yaml.safe_load(preset_text("demo")), "output": scratch, **smaller(tokens)})
        directory = pipeline.run(config, (listen,), backend=backend)
        manifests = {stage.name: read_manifest(directory / stage.directory) for stage in STAGES}
    seconds = {name: manifest.seconds for name, manifest in manifests.items() if manifest}
    return {**seconds, "outside stages": whole[0] - sum(seconds.values()), "whole run": whole[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=["ray", "plain"])
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.arm:
        print(json.dumps(measure(arguments.arm, arguments.tokens)))
        return
    rounds = interleave(__spec__.name, ["ray", "plain"], arguments.rounds, "--tokens", str(arguments.tokens))
    names = list(rounds["ray"][0])
    write_result(
        "ray_overhead",
        {
            **environment("python -m benchmarks.ray_overhead"),
            "setting": {"preset": "demo", "tokens": arguments.tokens, "rounds": arguments.rounds, "seed": 0},
            "seconds": {arm: spreads(results, names) for arm, results in rounds.items()},
            "ray_adds": {
                name: differences(figures(rounds["ray"], name), figures(rounds["plain"], name)) for name in names
            },
        },
    )


if __name__ == "__main__":
    main()
