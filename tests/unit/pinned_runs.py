"""Tiny runs of four families whose results are pinned: code that moves must not change what a run computes.

On the processor and with the packages of the record, results are equal to the bit; elsewhere, losses and weights are
equal up to rounding. For that, no document may lie between two clusters: a run has a cluster for each of its three
domains, so that rounding moves none. Trainings from given clusters are pinned as well: their packed tokens are made
here, so that a change of the corpus, of the tokenizer or of the clustering does not reach them.

`python tests/unit/pinned_runs.py` writes `pinned_results.json` anew; do so only for a change that is meant to alter
results.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
import platform
import random
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tiny_training import RECIPE, L, V, run, write_tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from moedisco_ray.core.config import RunConfig, check_config
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.models import open_checkpoint, read_config, write_checkpoint
from moedisco_ray.packed_tokens import write_packed
from moedisco_ray.stages.decompose import write_submodels
from moedisco_ray.stages.merge.tensors import merge
from moedisco_ray.training import TrainJob

FILE = Path(__file__).with_name("pinned_results.json")
DOMAINS, WORDS, DOCUMENTS, LENGTH = 3, 120, 150, 64
ROUNDING = 1e-3
"""Largest relative difference of losses between processors: 2e-7 was measured, and 2e-4 where a token selects other
experts."""
ROUNDING_OF_WEIGHTS = 1e-2
"""Largest difference of a group's projection between processors, in parts of the group's norm: 3e-5 was measured, and
7e-4 where a token selects other experts."""
GIVEN_STEPS = 12
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "moe_intermediate_size": 48,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
DENSE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": LENGTH,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
EXPERTS = 2 * DOMAINS
NESTEROV = {"lr": 0.7, "momentum": 0.9}
STARTS = {"mixtral": "mistral", "olmoe": "olmoe"}
"""What a family starts from where it does not start at random."""
RUNS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        # A seed of half the steps leaves documents between two clusters.
        "model": {"config": SIZES | {"num_experts": EXPERTS}},
        "tokens": {"total": 40_000, "seed_share": 0.4, "finetune_share": 0.3},
    },
    "qwen2_moe": {
        "model": {"config": SIZES | {"num_experts": EXPERTS, "shared_expert_intermediate_size": 24}},
        "tokens": {"seed_share": 0.0, "finetune_share": 0.4},
        "clusters": {"vectors": "mean_token"},
        "merge": {"backbone": "uniform", "router": "random"},
    },
    "mixtral": {
        "model": {"init": {"upcycle": "START", "num_experts": EXPERTS}},
        "tokens": {"seed_share": 0.3, "finetune_share": 0.3},
        "clusters": {"vectors": "tfidf_svd"},
    },
    "olmoe": {
        "merge": {"router": "ridge"},
        "model": {"init": {"checkpoint": "START"}},
        "tokens": {"seed_share": 0.0, "finetune_share": 0.3},
        "clusters": {"vectors": "random"},
    },
}


def write_text(directory: Path) -> None:
    """Three domains of made-up words: the same on every Python, as text of installed packages is not."""
    numbers = random.Random(0)
    for domain in range(DOMAINS):
        words = [
            "".join(numbers.choices("abcdefghijklmnop"[domain : domain + 12], k=numbers.randint(2, 7)))
            for _ in range(WORDS)
        ]
        likely = [1 / (1 + rank) for rank in range(WORDS)]
        documents = [" ".join(numbers.choices(words, likely, k=numbers.randint(40, 120))) for _ in range(DOCUMENTS)]
        directory.mkdir(exist_ok=True)
        (directory / f"domain{domain}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in documents)
        )


def write_tokenizer(directory: Path, text: Path) -> int:
    """Train a tokenizer of 400 tokens on a text and write it; return the number of its tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    lines = [json.loads(line)["text"] for path in sorted(text.iterdir()) for line in path.read_text().splitlines()]
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=400,
            show_progress=False,
            special_tokens=["<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)
    return int(tokenizer.get_vocab_size())


def write_start(directory: Path, kind: str, text: Path) -> Path:
    """A model with random weights and a tokenizer."""
    vocabulary = write_tokenizer(directory, text)
    experts = {"num_experts": EXPERTS, "num_experts_per_tok": 2} if kind == "olmoe" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = DENSE | experts | {"vocab_size": vocabulary}
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(directory)
    return directory


def config_of(family: str, home: Path) -> RunConfig:
    """The configuration of a pinned run; its text and start are made below `home`."""
    text = home / "text"
    write_text(text)
    settings = json.loads(json.dumps(RUNS[family]))
    if family in STARTS:
        start = str(write_start(home / "start", STARTS[family], text))
        settings["model"]["init"] = {
            key: start if value == "START" else value for key, value in settings["model"]["init"].items()
        }
    settings["model"]["family"] = family
    recipe = {"batch_tokens": 512, "lr": 2e-3}
    return check_config(
        {
            "name": family,
            "output": str(home / "runs"),
            "corpus": {
                "sources": [{"path": str(path), "name": path.stem} for path in sorted(text.iterdir())],
                "validation_fraction": 0.05,
                "sequence_length": LENGTH,
            },
            "tokenizer": {} if family in STARTS else {"train_vocab_size": 400},
            "model": settings["model"],
            "tokens": {"total": 20_000, **settings["tokens"]},
            "clusters": {"count": DOMAINS, "capacity": 1.2, **settings.get("clusters", {})},
            # The starts have learnt nothing that sub-models could lose.
            "submodels": {"optimizer": recipe, "sync_every": 4, "outer": NESTEROV, "start_loss": None},
            "finetune": {"optimizer": recipe},
            "merge": {"calibration_tokens": 2048, **settings.get("merge", {})},
            "pools": {"low_memory": {"max_workers": 2}, "high_memory": {"workers": 1}},
            "checkpoint": {"every": 10},
            "evaluation": {"max_tokens": 4000, "prompts": ["ab"]},
        }
    )


def train_given_clusters(family: str, home: Path) -> dict[str, Any]:
    """Decompose a random model, train each part on its own tokens, merge, and fine-tune; return losses and weights."""
    write_tiny(home / "whole", EXPERTS, family=family)
    for number in range(DOMAINS):
        numbers = np.random.Generator(np.random.Philox(key=[1, number]))
        documents = [np.cumsum(numbers.integers(0, 2 + number, size=60)) % (V - 1) + 1 for _ in range(24)]
        write_packed(home / "packed" / str(number), [documents], 0, V)
    whole = open_checkpoint(home / "whole")
    write_submodels(whole, read_config(whole.directory), DOMAINS, home / "parts")
    texts = tuple(home / "packed" / str(number) for number in range(DOMAINS))
    finetune = TrainJob(
        stage="finetune",
        name="finetune",
        model=home / "merged",
        packed_dirs=texts,
        output=home / "out",
        checkpoints=home / "steps",
        steps=GIVEN_STEPS,
        sequence_length=L,
        optimizer=RECIPE,
        checkpoint_every=None,
        load_balance=0.02,
        z_loss=0.01,
    )
    jobs = [
        dataclasses.replace(
            finetune,
            stage="submodels",
            name=f"submodel-{number}",
            model=home / "parts" / str(number),
            packed_dirs=(text,),
            output=home / f"out-{number}",
            checkpoints=home / f"steps-{number}",
            seed=number,
        )
        for number, text in enumerate(texts)
    ]
    losses = {job.name: run(job).losses for job in jobs}
    parts = [open_checkpoint(job.output) for job in jobs]
    merged = merge(parts, whole, whole.model_map, [1 / DOMAINS] * DOMAINS)
    write_checkpoint(finetune.model, ((report.key, tensor) for tensor, report in merged), read_config(whole.directory))
    losses[finetune.name] = run(finetune).losses
    return weights(finetune.output) | {"losses": {name: list(values) for name, values in losses.items()}}


def weights(model: Path) -> dict[str, Any]:
    """The SHA-256 of every file of weights, and of each group of tensors its norm and its projection on random signs.

    A group is the tensors of one name in all layers and experts.
    """
    files = sorted(model.glob("*.safetensors"))
    groups = collections.defaultdict(list)
    for path in files:
        for name, tensor in sorted(load_file(path).items()):
            groups[re.sub(r"\.\d+\.", ".*.", name)].append(tensor.double().flatten())
    found = {}
    for name, tensors in sorted(groups.items()):
        values = torch.cat(tensors).numpy()
        signs = np.random.Generator(np.random.Philox(key=[2, 0])).integers(0, 2, size=len(values)) * 2 - 1
        found[name] = {"norm": float(np.linalg.norm(values)), "projection": float(values @ signs)}
    return {"weights": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}, "groups": found}


def results(directory: Path) -> dict[str, Any]:
    """The exported weights, the clusters' sizes, the losses of all trainings, and the perplexity."""
    report = read_json(directory / "report.json")
    losses = {unit: curve["loss"] for unit, curve in report["curves"].items()}
    documents = [cluster["documents"] for cluster in report["clusters"]["clusters"]]
    return weights(directory / "model") | {
        "documents": documents,
        "losses": losses,
        "perplexity": report["evaluation"]["perplexity"],
    }


def surroundings() -> dict[str, str]:
    """What the last bits of a result depend on besides code and configuration."""
    return {
        "machine": platform.machine(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": " ".join(_processor()),
        **{name: version(name) for name in ("torch", "transformers", "numpy", "scipy", "scikit-learn", "tokenizers")},
    }


def compare(family: str, found: dict[str, Any], section: str = "runs") -> None:
    """Assert that results are those on record; on another processor or with other packages, up to rounding."""
    record = json.loads(FILE.read_text())
    pinned = record[section][family]
    assert found.get("documents") == pinned.get("documents")
    assert found["losses"].keys() == pinned["losses"].keys()
    if record["surroundings"] == surroundings():
        assert found == pinned
    for unit, losses in pinned["losses"].items():
        for ours, theirs in zip(found["losses"][unit], losses, strict=True):
            assert math.isclose(ours, theirs, rel_tol=ROUNDING), unit
    assert found["groups"].keys() == pinned["groups"].keys()
    for name, group in pinned["groups"].items():
        most = ROUNDING_OF_WEIGHTS * group["norm"]
        for figure, value in group.items():
            assert math.isclose(found["groups"][name][figure], value, abs_tol=most), (name, figure)
    assert math.isclose(found.get("perplexity", 0), pinned.get("perplexity", 0), rel_tol=ROUNDING)


def _processor() -> list[str]:
    """The first processor's vendor, family and model, where Linux lists them."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    pairs = [line.partition(":") for line in first]
    return [value.strip() for name, _, value in pairs if name.strip() in ("vendor_id", "cpu family", "model")]


def main() -> None:
    """Write the record, or compare the runs of the families that the arguments name with it."""
    torch.set_num_threads(1)
    for family in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as home:
            compare(family, results(pipeline.run(config_of(family, Path(home)), backend=LocalBackend())))
        with tempfile.TemporaryDirectory() as home:
            compare(family, train_given_clusters(family, Path(home)), "given")
    if not sys.argv[1:]:
        _write()


def _write() -> None:
    found, given = {}, {}
    for family in RUNS:
        with tempfile.TemporaryDirectory() as home:
            found[family] = results(pipeline.run(config_of(family, Path(home)), backend=LocalBackend()))
        with tempfile.TemporaryDirectory() as home:
            given[family] = train_given_clusters(family, Path(home))
    FILE.write_text(json.dumps({"surroundings": surroundings(), "runs": found, "given": given}, indent=1) + "\n")
    print(f"{FILE} written", file=sys.stderr)  # noqa: T201


if __name__ == "__main__":
    main()
