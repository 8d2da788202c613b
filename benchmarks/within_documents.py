"""Attention within documents against attention across them: the loss that a run reaches, and the speed of its training.

Each arm is a whole run of the demo in one plain process, with the same text, batches and seeds. Documents are cut so short that a
sequence holds several. Speed is that of the training stages, with the mask that CPUs need.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

import torch
import yaml

from benchmarks.harness import environment, interleave, ratios, spread, write_result
from moedisco_ray.core.artifacts import read_manifest
from moedisco_ray.core.config import check_config
from moedisco_ray.core.config.presets import preset_text
from moedisco_ray.core.records import CorpusSummary, EvaluateSummary, TrainingSummary
from moedisco_ray.core.stages import STAGES
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

ARMS = ("across", "within")
SEQUENCE, DOCUMENT = 512, 128
"""Tokens of a sequence, and most tokens of a document."""
TRAININGS = ("seed", "submodels", "finetune")


def settings(arm: str, tokens: int, seed: int) -> dict[str, Any]:
    """The demo's configuration, changed for an arm."""
    changed: dict[str, Any] = yaml.safe_load(preset_text("demo"))
    changed["corpus"] |= {"sequence_length": SEQUENCE, "max_document_tokens": DOCUMENT}
    for section in ("submodels", "finetune"):
        changed[section]["optimizer"]["within_documents"] = arm == "within"
    changed["tokens"]["total"] = tokens
    return {**changed, "seed": seed}


def measure(arm: str, tokens: int, seed: int) -> dict[str, float]:
    """Held-out bits per byte and perplexity of the model, tokens per second of each training stage, and documents per sequence."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        config = check_config({**settings(arm, tokens, seed), "output": scratch})
        directory = pipeline.run(config, (), backend=LocalBackend())
        found = {stage.name: read_manifest(directory / stage.directory) for stage in STAGES}
    summaries = {name: manifest.summary for name, manifest in found.items() if manifest}
    corpus = CorpusSummary.model_validate(summaries["corpus"])
    evaluated = EvaluateSummary.model_validate(summaries["evaluate"])
    speeds = {}
    for stage in TRAININGS:
        units = TrainingSummary.model_validate(summaries[stage]).units
        speeds[stage] = sum(unit.tokens for unit in units) / sum(unit.seconds for unit in units)
    return {
        "bits_per_byte": evaluated.bits_per_byte or 0.0, "perplexity": evaluated.perplexity or 0.0,
        "documents_per_sequence": SEQUENCE * corpus.documents / corpus.tokens, **speeds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.arm:
        print(json.dumps(measure(arguments.arm, arguments.tokens, arguments.seed)))
        return
    rounds = interleave(__spec__.name, ARMS, arguments.rounds, "--tokens", str(arguments.tokens), seeded=True)
    names = list(rounds["within"][0])
    write_result("within_documents", {
        **environment(f"python -m benchmarks.within_documents --tokens {arguments.tokens} --rounds {arguments.rounds}"),
        "setting": {
            "preset": "demo", "tokens": arguments.tokens, "sequence_length": SEQUENCE, "max_document_tokens": DOCUMENT,
            "documents_per_sequence": round(rounds["within"][0]["documents_per_sequence"], 2), "rounds": arguments.rounds,
            "seeds": list(range(arguments.rounds))},
        "arms": {arm: {name: spread([each[name] for each in found]) for name in names} for arm, found in rounds.items()},
        "within_over_across": {
            name: ratios(*([each[name] for each in rounds[arm]] for arm in ("within", "across"))) for name in names},
    })


if __name__ == "__main__":
    main()
