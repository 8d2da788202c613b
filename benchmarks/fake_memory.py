"""Could a plan measure memory by steps on FakeTensors, instead of computing it by formulas?

Steps of sub-models of published checkpoints, by `tests/unit/fake_trial.py` in processes of their own: with the fewest
layers that have a first, a last and each kind of layer, and one more; their peaks, by part of the step, are scaled to
all layers. Formulas and scaled steps are compared with steps of all layers. How many measurements a plan needs is
counted on plans of the same checkpoints.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.harness import RESULTS, ROOT, environment, write_result
from docs.plans import CHECKPOINTS, OTHERS
from moedisco_ray.core.config import Architecture, Optimizer, RunConfig, check_config
from moedisco_ray.plan import build, build_plan, memory, seed_workers
from moedisco_ray.plan.memory import Memory, compute_bytes, worker_memory

SETTINGS: dict[str, dict[str, Any]] = {
    "bf16 weights": {"precision": "pure_bf16"},
    "bf16 weights, recomputing": {"precision": "pure_bf16", "gradient_checkpointing": True, "micro_batch": 1},
    "bf16 products": {"precision": "bf16"},
    "Muon": {"precision": "pure_bf16", "name": "muon"},
    "fp32": {"precision": "fp32"},
    "moments in 8 bits, offloaded": {"precision": "pure_bf16", "moments": "fp8", "offload_moments": True},
    "block by block": {"precision": "pure_bf16", "block_steps": 100},
    "adapters on 4 bits": {"precision": "pure_bf16", "rank": 16, "base": "nf4"},
}
MODELS = {"gpt-oss-20b": len(SETTINGS), "Mixtral-8x7B": 5, "DeepSeek-V3": 2}
"""Checkpoints, and the number of settings with which each is measured."""
CARDS = (24, 16, 8)
"""Memory of the cheap cards of the counted plans (GB)."""
TARGETS = {"error": 0.05, "seconds": 10}


def steps(
    checkpoint: str, settings: list[dict[str, Any]], *options: str
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """What a process has measured, its seconds and its processor seconds."""
    paths = os.pathsep.join([str(ROOT.parent), str(ROOT.parent / "tests" / "unit")])
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "fake_trial", "--arm", checkpoint, "--settings", json.dumps(settings), *options],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **threads, "PYTHONPATH": paths},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return json.loads(done.stdout.splitlines()[-1]), {
        "seconds": time.perf_counter() - began,
        "processor_seconds": processor,
    }


def from_cache(measured: dict[str, Any]) -> float:
    """Seconds to find a measurement in a folder by architecture and settings."""
    key = hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / key
        path.write_text(json.dumps(measured), encoding="utf-8")
        began = time.perf_counter()
        json.loads(path.read_text(encoding="utf-8"))
        return time.perf_counter() - began


def measurements(checkpoint: str, card: int) -> dict[str, int | float]:
    """How often the plan of a run computes the memory of a worker, and for how many different settings.

    `activations` counts the settings with which autograd saves something else: weights, moments, the number of
    sequences and what workers exchange may stay formulas.
    """
    found: list[tuple[str, str]] = []

    def noted(family: str, sizes: Architecture, vocabulary: int, optimizer: Optimizer, **rest: Any) -> Memory:
        shared = {name: rest.get(name) for name in ("workers", "exchange", "layout", "lora", "gpu")}
        together = (rest.get("workers") or 1) > 1
        activations = (
            sizes,
            compute_bytes(optimizer, rest["gpu"]),
            optimizer.state,
            optimizer.gradient_checkpointing,
            bool(optimizer.block_steps),
            together,
            rest.get("lora"),
        )
        found.append((repr((sizes, optimizer, shared)), repr(activations)))
        return worker_memory(family, sizes, vocabulary, optimizer, **rest)  # type: ignore[arg-type]

    began = time.process_time()
    with (
        mock.patch.object(memory, "worker_memory", noted),
        mock.patch.object(build, "worker_memory", noted),
        mock.patch.object(seed_workers, "worker_memory", noted),
    ):
        build_plan(run_of(checkpoint, card))
    seconds = time.process_time() - began
    settings, activations = (len(set(each)) for each in zip(*found, strict=True))
    return {"asked": len(found), "settings": settings, "activations": activations, "processor_seconds": seconds}


def run_of(checkpoint: str, card: int) -> RunConfig:
    """A run as on the page of plans, with eight large cards."""
    family, vocabulary, sizes = (CHECKPOINTS | OTHERS)[checkpoint]
    optimizer = {"optimizer": {"batch_tokens": 32_768}}
    clusters = max(sizes.num_experts // 4, min(sizes.num_experts, 8))
    return check_config(
        {
            "name": "plan",
            "corpus": {"sources": [{"path": "embedded"}], "sequence_length": 1024},
            "model": {"family": family, "config": sizes.model_dump(exclude_unset=True) | {"vocab_size": vocabulary}},
            "tokens": {"total": 1_000_000_000},
            "clusters": {"count": clusters},
            "submodels": optimizer,
            "finetune": optimizer,
            "pools": {
                "low_memory": {"gpu": 1, "memory_gb": card, "max_workers": clusters},
                "high_memory": {"gpu": 1, "memory_gb": 80, "workers": 8},
            },
        }
    )


def lines(*names: str) -> int:
    """Lines of some files."""
    return sum(len((ROOT.parent / name).read_text(encoding="utf-8").splitlines()) for name in names)


def counted() -> dict[str, Any]:
    """Measurements of the plans, and with what they were counted."""
    plans = {
        f"{checkpoint}, {card} GB": measurements(checkpoint, card)
        for checkpoint, card in itertools.product(MODELS, CARDS)
    }
    made = {**environment("python -m benchmarks.fake_memory --plans"), "setting": {"cards_gb": CARDS, "large_cards": 8}}
    return {"plans": plans, "plans_made": made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", action="store_true", help="only count the plans' measurements again")
    arguments = parser.parse_args()
    if arguments.plans:
        write_result(
            "fake_memory", {**json.loads((RESULTS / "fake_memory.json").read_text(encoding="utf-8")), **counted()}
        )
        return
    cold, found = {}, {}
    for checkpoint, count in MODELS.items():
        _, cold[checkpoint] = steps(checkpoint, [SETTINGS["bf16 weights"]], "--few")
        names = list(SETTINGS)[:count]
        results, _ = steps(checkpoint, [SETTINGS[name] for name in names])
        found[checkpoint] = dict(zip(names, results, strict=True))
    write_result(
        "fake_memory",
        {
            **environment("python -m benchmarks.fake_memory"),
            "setting": {"models": list(found), "experts": 4, "sequences": 2, "sequence_length": 1024, "threads": 1},
            "targets": TARGETS,
            "cold": cold,
            "cached_seconds": from_cache(found),
            "steps": found,
            **counted(),
            "lines": {
                "of formulas": lines(
                    *(
                        f"moedisco_ray/plan/{name}_memory.py"
                        for name in ("activation", "attention", "recurrent", "adapter", "gang", "stage")
                    ),
                    "moedisco_ray/plan/memory.py",
                ),
                "of fake steps": lines(
                    *(
                        f"tests/unit/{name}.py"
                        for name in ("fake_steps", "test_fake_gang_memory", "test_fake_inference_memory")
                    )
                ),
            },
        },
    )


if __name__ == "__main__":
    main()
