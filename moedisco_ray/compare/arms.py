"""The arms of a comparison, as data: each is the settings in which it differs from the configuration that is compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from moedisco_ray.config import RunConfig, check_config, put
from moedisco_ray.errors import ConfigError
from moedisco_ray.plan import Plan, build_plan

Budget = Literal["tokens", "dollars"]
"""What an arm has as much of as the first one: it is trained once for each."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        title: In tables and figures.
        settings: Dotted configuration paths and their values; a function makes a value of the base configuration.
        measured: Which of the run's models is the arm's result, as `evaluation.json` calls it.
    """

    title: str
    settings: Mapping[str, Any | Callable[[RunConfig], Any]]
    measured: Literal["finetune", "ensemble"] = "finetune"


_ALL = [{"train": "all", "share": 1.0}]
_WHOLE: Mapping[str, Any] = {
    "tokens.finetune_share": lambda base: 1.0 - base.tokens.seed_share,
    "finetune.phases": _ALL,
    "finetune.dense_gate": 0.0,
    "finetune.early_stop": None,
    "evaluation.ensemble": False,
}
_ONE_SHOT: Mapping[str, Any] = {"submodels.sync_every": None, "submodels.backbone_lr_scale": 1.0}
_JOINT: Mapping[str, Any] = {
    **_WHOLE,
    "tokens.seed_share": 0.0,
    "tokens.finetune_share": 1.0,
    "finetune.optimizer.lr": lambda base: base.submodels.optimizer.lr,  # from a start that nothing was trained of
}

_PLAIN_MERGE: Mapping[str, Any] = {
    "merge.backbone": "uniform", "merge.delta_scale": 1.0, "merge.router": "random", "merge.match_load": False}

REFERENCE = "joint"
"""The arm that all others are measured against."""

ARMS: Mapping[str, Arm] = {
    REFERENCE: Arm("joint, high-memory pool", _JOINT),
    "joint-low": Arm("joint, low-memory pool", {**_JOINT, "finetune.pool": "low_memory"}),
    "disco": Arm("MoE-DisCo, as configured", {}),
    "paper": Arm("MoE-DisCo, as the paper", {
        "tokens.seed_share": 0.0,
        "tokens.finetune_share": 0.194,
        "clusters.method": "kmeans",
        "clusters.vectors": "mean_token",
        "clusters.capacity": None,
        "clusters.overlap": 0.0,
        "submodels.optimizer.schedule": "constant",
        "submodels.optimizer.warmup": 0.0,
        "submodels.keep_moments": False,
        **_ONE_SHOT,
        **_PLAIN_MERGE,
        "merge.match_scale": False,
        "finetune.phases": _ALL,
        "finetune.dense_gate": 0.0,
        "finetune.spike_guard": None,
        "finetune.early_stop": None,
        "finetune.keep_moments": False,
        "finetune.load_balance": 0.0,
        "finetune.z_loss": 0.0,
    }),
    "upcycle": Arm("sparse upcycling", {     # the seed has the sub-models' tokens too: what do they add?
        **_WHOLE,
        "tokens.seed_share": lambda base: 1.0 - base.tokens.finetune_share,
        "tokens.finetune_share": lambda base: base.tokens.finetune_share,
    }),
    "btx": Arm("BTX", {**_ONE_SHOT, **_PLAIN_MERGE}),
    "spes": Arm("SPES-like, H = 100", {
        "tokens.seed_share": 0.0,
        "clusters.vectors": "tfidf_svd",    # hidden states need a seed
        "submodels.sync_every": 100,
        "submodels.outer": {"lr": 1.0, "momentum": 0.0},
        **_PLAIN_MERGE,
    }),
    "random-clusters": Arm("MoE-DisCo, random clusters", {"clusters.method": "random"}),
    "ensemble": Arm(
        "c-BTM ensemble", {"tokens.finetune_share": 0.0, **_ONE_SHOT, "evaluation.ensemble": True}, "ensemble"),
}


def chosen(names: Sequence[str], arms: Mapping[str, Arm] = ARMS) -> dict[str, Arm]:
    """The named arms, the reference first; of no names, all.

    Raises:
        ConfigError: There is no such arm.
    """
    for name in names:
        if name not in arms:
            raise ConfigError("--arms", name, f"no such arm; there are {', '.join(arms)}")
    wanted = {REFERENCE, *(names or arms)}
    return {name: arm for name, arm in arms.items() if name in wanted}


def arm_config(base: RunConfig, name: str, arm: Arm, output: Path, budget: Budget, tokens: int) -> RunConfig:
    """The configuration of one arm's run, OUTPUT/NAME-BUDGET.

    Raises:
        ConfigError: The base configuration does not allow for the arm.
    """
    raw = base.model_dump(mode="json")
    for path, value in arm.settings.items():
        put(raw, path, value(base) if callable(value) else value)
    put(raw, "tokens.total", tokens)
    raw |= {"name": f"{name}-{budget}", "output": str(output)}
    if raw["evaluation"]["every_tokens"] is None:
        raw["evaluation"]["every_tokens"] = max(1, base.tokens.total // _LOOKS)
    return check_config(raw)


def tokens_for(base: RunConfig, arm: Arm, budget: Budget) -> int:
    """The arm's tokens at as many tokens, or as many planned dollars, as joint training of `base.tokens.total` tokens.

    Raises:
        ConfigError: The base configuration does not allow for the arm, or its training costs nothing.
    """
    if budget == "tokens":
        return base.tokens.total
    joint, ours = (planned(base, each).dollars for each in (ARMS[REFERENCE], arm))
    if not ours:
        raise ConfigError("pools", None, "an arm costs nothing, so nothing is as dear; give the pools prices")
    return round(base.tokens.total * joint / ours)


def planned(base: RunConfig, arm: Arm) -> Plan:
    """The plan of an arm at the base configuration's tokens."""
    return build_plan(arm_config(base, "arm", arm, base.output, "tokens", base.tokens.total))


_LOOKS = 40
"""Looks at the held-out loss, over as many tokens as the configuration has, where it does not say how often."""
