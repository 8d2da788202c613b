"""Synthetic results of `python -m benchmarks.study compare`, with losses from a formula instead of training."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.compare.accounting import Reads, account, dollars_of, hours_of
from benchmarks.study.compare.arms import ARMS, REFERENCE, Arm, arm_config, tokens_for
from benchmarks.study.compare.records import Comparison, Row
from benchmarks.study.recipe import recipe, subject
from moedisco_ray.core.config import RunConfig
from moedisco_ray.plan import build_plan

Law = Callable[[float], float]

MODEL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "moe_intermediate_size": 128}
LAWS: Mapping[str, Law] = {
    "joint": lambda tokens: 2.0 + 40 * tokens**-0.22,
    "disco": lambda tokens: 2.0 + 41 * tokens**-0.22,
    "paper": lambda tokens: 2.3 + 43 * tokens**-0.22,
}


def base_config(**sections: Any) -> RunConfig:
    given = {
        "name": "small", "corpus": {"sources": [{"path": "embedded"}]}, "model": {"config": MODEL},
        "tokens": {"total": 40_000_000, "seed_share": 0.3}, "clusters": {"count": 4}, **sections}
    return RunConfig.model_validate(given)


def nothing(config: RunConfig, arm: Arm) -> Reads:
    return {}


def comparison(
    base: RunConfig, laws: Mapping[str, Law] = LAWS, seed: int = 0, noise: float = 0.0, times: Sequence[float] = (1,),
    reads: Callable[[RunConfig, Arm], Reads] = nothing,
) -> Comparison:
    """One run per arm, budget and size; `times` multiplies the base configuration's tokens, `reads` is read outside training."""
    rng = random.Random(seed)
    of_seed = rng.gauss(0, noise)
    rows = []
    for factor in times:
        sized = base.model_copy(update={"tokens": base.tokens.model_copy(update={"total": round(base.tokens.total * factor)})})
        for name, law in laws.items():
            for budget in ("tokens",) if name == REFERENCE else ("tokens", "dollars"):
                arm = ARMS[name]
                config = arm_config(sized, name, arm, Path("runs"), budget, tokens_for(sized, arm, budget, reads))
                plan = build_plan(config)
                phases = account(config, plan, reads(config, arm))
                loss = law(plan.tokens) + of_seed + rng.gauss(0, noise / 2)
                rows.append(Row(
                    arm=name, title=arm.title, budget=budget, run=config.name, measured=arm.measured, recipe=recipe(config),
                    subject=subject(config, plan), tokens=plan.tokens, flops=sum(phase.flops for phase in phases),
                    dollars=dollars_of(phases), hours=hours_of(phases), phases=tuple(phases), metered_dollars=dollars_of(phases),
                    worker_seconds={}, loss=loss, perplexity=math.exp(loss), bits_per_byte=None, sources=None, specialisation=None,
                    dead_experts=None, unseen=None, curve=()))
    return Comparison(reference=REFERENCE, name=base.name, seed=seed, target_loss=rows[0].loss, rows=tuple(rows))


def stored(table: Comparison) -> dict[str, Any]:
    """The comparison as `compare.json` stores it."""
    return table.model_dump(mode="json")


def only(table: Comparison, keep: Callable[[Row], bool]) -> Comparison:
    """The comparison with some of its rows."""
    return table.model_copy(update={"rows": tuple(filter(keep, table.rows))})
