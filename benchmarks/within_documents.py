"""Attention within documents against attention across them: the loss that a run reaches, and the speed of a step.

Each arm is a whole run of the demo in one plain process, with the same text, batches and seeds. Without options,
documents are cut so short that a sequence holds several. With `--steps`, one process makes steps of both arms in turn,
with the mask that CPUs need.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.harness import environment, figures, interleave, ratios, spread, spreads, write_result
from moedisco_ray.core.config import Architecture, Optimizer, check_config
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.records.summaries import CorpusSummary, EvaluateSummary
from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.store.artifacts import read_manifest
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.models import config_values, hf_config, random_weights, write_checkpoint
from moedisco_ray.plan.parameters import submodel_architecture
from moedisco_ray.training import TrainJob, World
from moedisco_ray.training.batches import MicroBatch
from moedisco_ray.training.sharding import trainable
from moedisco_ray.training.stepper import ResidentStepper

ARMS = ("across", "within")
SEQUENCES, DOCUMENTS, STEPS, WARM = 2, 6, 40, 5
"""Sequences of a measured step, documents in each, and numbers of measured and of first steps."""


def settings(arm: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The demo's configuration, changed for an arm."""
    changed: dict[str, Any] = yaml.safe_load(preset_text("demo"))
    changed["corpus"] |= {"sequence_length": arguments.sequence, "max_document_tokens": arguments.document}
    for section in ("submodels", "finetune"):
        changed[section]["optimizer"]["within_documents"] = arm == "within"
    changed["tokens"]["total"] = arguments.tokens
    return {**changed, "seed": arguments.seed}


def measure(arm: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Held-out bits per byte and perplexity of the model, and documents per sequence."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        config = check_config({**settings(arm, arguments), "output": scratch})
        directory = pipeline.run(config, (), backend=LocalBackend())
        found = {stage.name: read_manifest(directory / stage.directory) for stage in STAGES}
    summaries = {name: manifest.summary for name, manifest in found.items() if manifest}
    corpus = CorpusSummary.model_validate(summaries["corpus"])
    evaluated = EvaluateSummary.model_validate(summaries["evaluate"])
    return {
        "bits_per_byte": evaluated.bits_per_byte or 0.0,
        "perplexity": evaluated.perplexity or 0.0,
        "documents_per_sequence": arguments.sequence * corpus.documents / corpus.tokens,
    }


def step_seconds(sequence: int) -> dict[str, list[float]]:
    """Processor seconds of steps of a sub-model of the demo, by arm."""
    torch.set_num_threads(1)
    raw = yaml.safe_load(preset_text("demo"))
    sizes = submodel_architecture("qwen3_moe", Architecture(**raw["model"]["config"]), 4)
    vocabulary = raw["tokenizer"]["train_vocab_size"]
    tokens = torch.randint(vocabulary, (SEQUENCES, sequence), generator=torch.Generator().manual_seed(0))
    positions = (torch.arange(sequence) % -(-sequence // DOCUMENTS)).expand(SEQUENCES, -1)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as scratch:
        config = config_values(hf_config("qwen3_moe", sizes, vocabulary, sequence, 0))
        write_checkpoint(Path(scratch), random_weights(config, 0).items(), config)
        steppers = {}
        for arm in ARMS:
            recipe = Optimizer(batch_tokens=SEQUENCES * sequence, within_documents=arm == "within")
            job = TrainJob(
                stage="submodels",
                name=arm,
                model=Path(scratch),
                packed_dirs=(),
                output=Path(),
                checkpoints=Path(),
                steps=STEPS,
                sequence_length=sequence,
                optimizer=recipe,
                checkpoint_every=None,
            )
            steppers[arm] = ResidentStepper(trainable(job.model, recipe, World()), job, World())
    for step in range(WARM + STEPS):
        for arm, stepper in steppers.items():
            began = time.process_time()
            stepper([MicroBatch(tokens, tokens, tokens.numel(), None, positions if arm == "within" else None)])
            if step >= WARM:
                seconds[arm].append(time.process_time() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequence", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--document", type=int, default=128, help="most tokens of a document")
    parser.add_argument("--steps", action="store_true", help="measure steps instead of runs")
    parser.add_argument("--result", default="within_documents", help="name of the result file")
    arguments = parser.parse_args()
    if arguments.arm:
        print(json.dumps(measure(arguments.arm, arguments)))
        return
    if arguments.steps:
        seconds = step_seconds(arguments.sequence)
        write_result(
            "within_documents_steps",
            {
                **environment(f"python -m benchmarks.within_documents --steps --sequence={arguments.sequence}"),
                "setting": {
                    "preset": "demo",
                    "experts": 1,
                    "sequence_length": arguments.sequence,
                    "sequences": SEQUENCES,
                    "documents_per_sequence": DOCUMENTS,
                    "steps": STEPS,
                    "warm_up_steps": WARM,
                    "threads": 1,
                },
                "seconds": {arm: spread(each) for arm, each in seconds.items()},
                "within_over_across": ratios(seconds["within"], seconds["across"]),
            },
        )
        return
    options = [f"--{name}={getattr(arguments, name)}" for name in ("tokens", "sequence", "document")]
    rounds = interleave(__spec__.name, ARMS, arguments.rounds, *options, seeded=True)
    names = list(rounds["within"][0])
    command = " ".join(
        [
            "python -m benchmarks.within_documents",
            *options,
            f"--rounds={arguments.rounds}",
            f"--result={arguments.result}",
        ]
    )
    write_result(
        arguments.result,
        {
            **environment(command),
            "setting": {
                "preset": "demo",
                "tokens": arguments.tokens,
                "sequence_length": arguments.sequence,
                "max_document_tokens": arguments.document,
                "documents_per_sequence": round(rounds["within"][0]["documents_per_sequence"], 2),
                "rounds": arguments.rounds,
                "seeds": list(range(arguments.rounds)),
            },
            "arms": {arm: spreads(found, names) for arm, found in rounds.items()},
            "within_over_across": {
                name: ratios(figures(rounds["within"], name), figures(rounds["across"], name)) for name in names
            },
        },
    )


if __name__ == "__main__":
    main()
