"""Members that train a whole MoE apart and synchronise rarely, against joint training on the same tokens.

    python -m benchmarks.members --work FOLDER

Rates and outer steps are swept on the corpus and the seed for tuning, the rate from that of joint training up to twice
that; reported are other text and other seeds. A folder of raw results lets a killed measurement continue. All members
together train on as many tokens per step as joint training does. The models are small: what counts is the trend over
steps, batch and syncs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import environment, spread, write_result
from benchmarks.study.compare.arms import ARMS, REFERENCE, Arm, arm_config
from benchmarks.study.compare.reading import evaluated
from benchmarks.study.compare.run import share_corpus
from benchmarks.study.grid.cells import TUNING_CORPUS, TUNING_SEED, Cell, base_config, corpora_folder
from benchmarks.study.grid.find_corpus import EMBEDDED
from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import DivergedError
from moedisco_ray.core.store.artifacts import read_manifest
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution import pipeline
from moedisco_ray.execution.local_backend import LocalBackend

BATCH, TOKENS = 2048, 1_150_000
RATES = (8e-3, 16e-3, 32e-3)
OUTERS = ((1.0, 0.0), (0.7, 0.6), (0.7, 0.9))


class Setting(NamedTuple):
    """One training. With one member it is joint training."""

    members: int
    every: int
    rate: float
    outer: tuple[float, float] = (1.0, 0.0)
    bits: int | None = None
    batch: int = BATCH
    tokens: int = TOKENS

    @property
    def name(self) -> str:
        """Its name in the raw results, and that of its run."""
        if self.members == 1:
            return f"joint-{self.rate:g}-{self.batch}-{self.tokens}"
        bits = "" if self.bits is None else f"-{self.bits}bit"
        outer = "-".join(f"{value:g}" for value in self.outer)
        return f"m{self.members}-h{self.every}-{self.rate:g}-{outer}{bits}-{self.batch}-{self.tokens}"

    @property
    def arm(self) -> Arm:
        """The settings in which it differs from the cell."""
        if self.members == 1:
            own = {"finetune.optimizer.lr": self.rate, "finetune.optimizer.batch_tokens": self.batch}
            return Arm("joint", {**ARMS[REFERENCE].settings, **own})
        settings = {
            "tokens.seed_share": 1.0,
            "tokens.finetune_share": 0.0,
            "clusters.count": 1,
            "submodels.seed_members": self.members,
            "submodels.sync_every": self.every,
            "submodels.sync_bits": self.bits,
            "submodels.outer.lr": self.outer[0],
            "submodels.outer.momentum": self.outer[1],
            "submodels.optimizer.batch_tokens": self.batch // self.members,
            "submodels.optimizer.lr": self.rate,
            "pools.low_memory.max_workers": self.members,
            "pools.low_memory.seed_workers": 1,
        }
        return Arm("members", settings)


def swept() -> Iterator[Setting]:
    """The trainings on the corpus for tuning: rates first, then outer steps at the middle rate."""
    yield from (Setting(1, 0, rate) for rate in RATES)
    yield from (Setting(4, 16, rate) for rate in RATES)
    yield from (Setting(4, 16, RATES[1], outer) for outer in OUTERS[1:])


def reported(joint: float, rate: float, outer: tuple[float, float]) -> Iterator[Setting]:
    """The trainings that are reported, at the rates and the outer step of the sweep."""
    for batch, tokens in ((BATCH, TOKENS), (4 * BATCH, TOKENS), (BATCH, 2 * TOKENS)):
        yield Setting(1, 0, joint, batch=batch, tokens=tokens)
        yield Setting(4, 16, rate, outer, batch=batch, tokens=tokens)
    yield Setting(4, 4, rate, outer)
    yield Setting(2, 16, rate, outer)
    yield Setting(4, 16, rate, outer, bits=4)


def measure(setting: Setting, corpus: str, seed: int, work: Path) -> dict[str, Any]:
    """Train, and return the held-out loss and the bytes of a sync per weight and direction."""
    corpora = known_corpora_folder()
    cell = Cell(corpus=corpus, family="qwen3_moe", start="random", experts=16, top_k=2, budget=1, scale="small")
    base = base_config(cell, seed, corpora, work / f"{corpus}-{seed}")
    config = arm_config(base, setting.name, setting.arm, base.output, "tokens", setting.tokens)
    shared = RunStore.of(work / f"{corpus}-{seed}" / "shared")
    share_corpus(config, [shared])
    began = time.monotonic()
    try:
        directory = pipeline.run(config, backend=LocalBackend())
    except DivergedError:
        return {"loss": None}
    found = {
        "loss": evaluated(directory, "finetune").loss,
        "seconds": round(time.monotonic() - began),
        "bits": bits_sent(config, setting),
    }
    if not (shared.directory / "corpus").exists():
        shared.directory.mkdir(parents=True, exist_ok=True)
        (directory / "corpus").rename(shared.directory / "corpus")
    shutil.rmtree(directory)
    return found


def known_corpora_folder() -> Path | None:
    """The folder that MOEDISCO_CORPORA names, or that next to the repository."""
    named = os.environ.get("MOEDISCO_CORPORA")
    return Path(named) if named else corpora_folder(Path(__file__).resolve().parents[1])


def bits_sent(config: RunConfig, setting: Setting) -> float | None:
    """Bits per weight that a member has published at the last sync; None without members."""
    if setting.members == 1:
        return None
    summary = read_manifest(config.directory / "seed").summary  # type: ignore[union-attr]
    [*_, last] = summary["syncs"]
    weights = (config.directory / "seed" / "model.safetensors").stat().st_size / 4
    return 8 * statistics.mean(last["bytes"].values()) / weights


def all_measured(settings: Iterable[tuple[Setting, str, int]], work: Path) -> dict[str, dict[str, Any]]:
    """The results of trainings by name; those that the folder has are not repeated."""
    work.mkdir(parents=True, exist_ok=True)
    file, found = work / "raw.json", {}
    known = json.loads(file.read_text()) if file.exists() else {}
    for setting, corpus, seed in settings:
        name = f"{setting.name}-{corpus}-{seed}"
        if name not in known:
            known[name] = measure(setting, corpus, seed, work)
            file.write_text(json.dumps(known))
            print(name, known[name], file=sys.stderr, flush=True)
        found[name] = known[name]
    return found


def best(settings: Iterable[Setting], found: dict[str, dict[str, Any]]) -> Setting:
    """The setting with the lowest loss on the corpus for tuning."""
    losses = {each: found[f"{each.name}-{TUNING_CORPUS}-{TUNING_SEED}"]["loss"] for each in settings}
    return min((each for each, loss in losses.items() if loss is not None), key=lambda each: losses[each])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of runs and raw results")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="seeds to report")
    arguments = parser.parse_args()
    work, seeds = arguments.work, arguments.seeds
    sweep = all_measured(((each, TUNING_CORPUS, TUNING_SEED) for each in swept()), work)
    joint = best((each for each in swept() if each.members == 1), sweep)
    members = best((each for each in swept() if each.members > 1), sweep)
    settings = list(reported(joint.rate, members.rate, members.outer))
    found = all_measured(((each, EMBEDDED, seed) for seed, each in itertools.product(seeds, settings)), work)
    rows = []
    for each in settings:
        against = Setting(1, 0, joint.rate, batch=each.batch, tokens=each.tokens)
        ours = [found[f"{each.name}-{EMBEDDED}-{seed}"] for seed in seeds]
        theirs = [found[f"{against.name}-{EMBEDDED}-{seed}"] for seed in seeds]
        gaps = [mine["loss"] - other["loss"] for mine, other in zip(ours, theirs, strict=True)]
        losses = spread([one["loss"] for one in ours])
        rows.append({**each._asdict(), "loss": losses, "gap": spread(gaps), "bits_sent": ours[0]["bits"]})
    write_result(
        "members",
        {
            **environment(f"python -m benchmarks.members --work runs/members --seeds {' '.join(map(str, seeds))}"),
            "setting": {"seeds": seeds, "parameters": "0.55 million", "joint": joint.rate},
            "sweep": {name: each["loss"] for name, each in sweep.items()},
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
