"""Memory and speed of the stages that handle the whole MoE, on a model of several GB in bf16.

copy         copy the merged model's files, for the speed of the disk
join         join the sub-models tensor by tensor and write the MoE
merge        the same with calibrated routers: the whole merge
evaluate     perplexity of the MoE on a few documents
export       the export in another dtype of the same size, with its checks of the written model
published    the export in the stored dtype, whose files are linked, with its checks

Memory is the process's own, without pages of mapped files, which the kernel takes back when it needs them. Files are
read from the disk, and written ones are on the disk when the clock stops.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.corpus_scale import sentences
from benchmarks.harness import by_arm, environment, interleave, ratios, spread, write_result
from moedisco_ray.core.config import Architecture, check_config
from moedisco_ray.core.records.report import build_report
from moedisco_ray.models import (
    ModelMap,
    Stored,
    canonical_shapes,
    config_values,
    expert_count,
    group_size,
    hf_config,
    open_checkpoint,
    submodel_config,
    write_checkpoint,
)
from moedisco_ray.stages.decompose import backbone_of, decompose
from moedisco_ray.stages.evaluate.measure import evaluate
from moedisco_ray.stages.export.directory import export
from moedisco_ray.stages.merge.backbone import merge_weights
from moedisco_ray.stages.merge.build import build_merged, write_merged
from moedisco_ray.stages.merge.calibrate import RouterSettings
from moedisco_ray.stages.text.tokenizer import save_trained, train_bpe
from moedisco_ray.stages.text.validation import Documents

FAMILY, SUBMODELS, VOCABULARY, LENGTH = "olmoe", 4, 32_000, 128
WINDOWS, DOCUMENTS = 4, 4
"""Calibration windows and documents to evaluate: few, because the model computes on one core."""
SIZES = {
    "hidden_size": 1024,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "moe_intermediate_size": 512,
    "num_experts": 40,
    "num_experts_per_tok": 2,
}
ARMS = ("copy", "join", "merge", "evaluate", "export", "published")
TARGETS = {"own_mb": 1536, "of_copy": 0.7}
_LOOK_SECONDS = 0.005


class Noise(Mapping[str, Tensor]):
    """Tensors of bf16 noise, made on access, quickly: cuts of one array of random numbers."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
        self._shapes, self._seed = shapes, seed
        self._pool = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()

    def __getitem__(self, key: str) -> Tensor:
        shape = self._shapes[key]
        if key.endswith("norm.weight"):
            return torch.ones(shape, dtype=torch.bfloat16)
        size = int(np.prod(shape))
        start = abs(hash((self._seed, *key.encode()))) % (1 << 20)  # a tuple of numbers has the same hash everywhere
        times = -(-(start + size) // len(self._pool))
        pool = self._pool if times == 1 else self._pool.repeat(times)
        return pool[start : start + size].view(shape).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def config() -> dict[str, Any]:
    architecture = Architecture.model_validate({**SIZES, "norm_topk_prob": False})
    return config_values(hf_config(FAMILY, architecture, VOCABULARY, 2 * LENGTH, 0))


def prepare(home: Path) -> None:
    """Write trained sub-models with backbones that differ, the backbone that they started from, and a tokenizer."""
    whole, names = config(), ModelMap(FAMILY)
    experts = expert_count(whole)
    values = submodel_config(whole, group_size(experts, SUBMODELS))
    for k in range(SUBMODELS):
        tensors = decompose(Noise(canonical_shapes(whole), k), names, experts, SUBMODELS, k)
        layout = {key: Stored(shape, torch.bfloat16) for key, shape in canonical_shapes(values).items()}
        write_checkpoint(home / "submodels" / str(k), tensors, values, layout=layout)
    write_checkpoint(home / "backbone", backbone_of(Noise(canonical_shapes(whole), 0), names), values)
    save_trained(train_bpe(iter([next(sentences(1)) for _ in range(50)]), 1024), home / "tokenizer")


def measure(arm: str, home: Path) -> dict[str, float]:
    """Seconds, bytes written and the peak of the process's own memory."""
    inputs = {"copy": ["merged"], "join": ["submodels", "backbone"], "merge": ["submodels", "backbone"]}.get(
        arm, ["merged"]
    )
    target = home / ("merged" if arm == "merge" else "out")
    shutil.rmtree(target, ignore_errors=True)
    settle([path for name in inputs for path in (home / name).rglob("*.safetensors")], forget=True)
    before = own_mb()
    with own_memory() as peak:
        started = time.perf_counter()
        run(arm, home, target)
        files = list(target.rglob("*.safetensors"))
        settle(files, forget=False)
        total = time.perf_counter() - started
    size = sum(path.stat().st_size for path in files)
    return {"seconds": total, "bytes": size, "own_mb": peak[0], "grown_mb": peak[0] - before}


def run(arm: str, home: Path, target: Path) -> None:
    whole, merged = config(), home / "merged"
    submodels = [home / "submodels" / str(k) for k in range(SUBMODELS)]
    weights = merge_weights("token_weighted", range(1, SUBMODELS + 1))
    match arm:
        case "copy":
            target.mkdir()
            for path in merged.glob("*.safetensors"):
                shutil.copyfile(path, target / path.name)
        case "join":
            write_merged(
                [open_checkpoint(path) for path in submodels],
                open_checkpoint(home / "backbone"),
                whole,
                weights,
                [],
                directory=target,
                router=None,
            )
        case "merge":
            tokens = np.random.default_rng(0).integers(0, VOCABULARY, (WINDOWS, LENGTH))
            build_merged(
                submodels,
                home / "backbone",
                whole,
                weights,
                [(tokens, np.arange(WINDOWS) % SUBMODELS)],
                directory=target,
                router=RouterSettings("ridge"),
            )
        case "evaluate":
            tokens = np.random.default_rng(1).integers(0, VOCABULARY, (DOCUMENTS, LENGTH), dtype=np.int32)
            ids = tuple(bytes([number]) for number in range(DOCUMENTS))
            documents = Documents(
                ids, ("noise",) * DOCUMENTS, ("text",) * DOCUMENTS, tuple(tokens), (None,) * DOCUMENTS
            )
            evaluate(merged, documents, prefix=0, sequence_length=LENGTH)
        case _:
            run_export(home, target, "fp16" if arm == "export" else "auto")


def run_export(home: Path, target: Path, dtype: Any) -> None:
    report = build_report(
        home,
        check_config(
            {
                "name": "sizes",
                "corpus": {"sources": [{"path": "embedded"}]},
                "model": {"family": FAMILY, "config": SIZES},
            }
        ),
    )
    export(home / "merged", home / "tokenizer", target, report, dtype=dtype)


def settle(files: list[Path], *, forget: bool) -> None:
    """Wait until files are on the disk; with `forget`, drop them from the page cache too."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        if forget:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def own_mb() -> float:
    return int(Path("/proc/self/status").read_text(encoding="utf-8").split("RssAnon:")[1].split()[0]) / 1024


@contextlib.contextmanager
def own_memory() -> Iterator[list[float]]:
    """The largest anonymous memory of this process in MB until the block ends, in a list of one number."""
    peak, ended = [0.0], threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK_SECONDS):
            peak[0] = max(peak[0], own_mb())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def _megabytes_per_second(results: Sequence[Mapping[str, Any]]) -> list[float]:
    return [each["bytes"] / each["seconds"] / 1e6 for each in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=["prepare", *ARMS])
    parser.add_argument("--home", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.arm:
        torch.set_num_threads(1)
        found = prepare(arguments.home) if arguments.arm == "prepare" else measure(arguments.arm, arguments.home)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory(dir=arguments.home) as scratch:
        home = "--home", scratch
        # the first merge makes the model that the other arms read
        interleave(__spec__.name, ["prepare", "merge"], 1, *home)
        arms = interleave(__spec__.name, ARMS, arguments.rounds, *home)
    speed = {arm: _megabytes_per_second(arms[arm]) for arm in ("copy", "join", "merge", "export")}
    write_result(
        "true_sizes",
        {
            **environment("python -m benchmarks.true_sizes"),
            "setting": {
                "family": FAMILY,
                **SIZES,
                "submodels": SUBMODELS,
                "vocabulary": VOCABULARY,
                "gigabytes": round(arms["copy"][0]["bytes"] / 1e9, 2),
                "calibration_tokens": WINDOWS * LENGTH,
                "evaluated_tokens": DOCUMENTS * LENGTH,
                "rounds": arguments.rounds,
            },
            "targets": TARGETS,
            "own_mb": {arm: spread(values) for arm, values in by_arm(arms, "own_mb").items()},
            "seconds": {arm: spread(values) for arm, values in by_arm(arms, "seconds").items()},
            "mb_per_second": {name: spread(values) for name, values in speed.items()},
            "of_copy": {name: ratios(values, speed["copy"]) for name, values in speed.items() if name != "copy"},
        },
    )


if __name__ == "__main__":
    main()
