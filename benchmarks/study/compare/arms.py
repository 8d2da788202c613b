"""The arms of a comparison: the settings in which each differs from the base configuration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from benchmarks.study.compare.accounting import Reads, account
from benchmarks.study.compare.records import Budget, Measured
from moedisco_ray.core.config import RunConfig, check_config, put
from moedisco_ray.core.config.run import divisors
from moedisco_ray.core.config.sections import Tokens
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.store.locations import Location
from moedisco_ray.plan import Plan, build_plan


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        title: Title in tables and figures.
        settings: Values by dotted configuration path; a function computes the value from the base configuration.
        measured: Model that is the arm's result.
    """

    title: str
    settings: Mapping[str, Any | Callable[[RunConfig], Any]]
    measured: Measured = "finetune"


_WHOLE: Mapping[str, Any] = {"tokens.finetune_share": lambda base: 1.0 - base.tokens.seed_share}


def _whole_rate(base: RunConfig) -> float:
    # Where a fine-tune has a lower rate, it is for sub-models that were synchronised; fresh models and the paper's were
    # not.
    return max(base.submodels.optimizer.lr, base.finetune.optimizer.lr)


def _whole_schedule(base: RunConfig) -> str:
    # With AdamW, decay only at the end was 0.16 nats better than a cosine from random weights, and 0.02 worse from a
    # dense model. With Muon a cosine was 0.03 nats better from random weights (one seed).
    return "wsd" if base.model.init == "random" and base.finetune.optimizer.name == "adamw" else "cosine"


def _small_moes(base: RunConfig) -> int:
    """Number of groups whose size is a small MoE with a live router.

    It is the configured number, or else makes groups of twice top-k experts, at most half of all experts.
    """
    whole = base.model.architecture
    if base.cluster_count < whole.num_experts:
        return base.cluster_count
    least = min(2 * whole.num_experts_per_tok, max(1, whole.num_experts // 2))
    return next(count for count in reversed(divisors(whole.num_experts)) if whole.num_experts // count >= least)


def half_of_experts(base: RunConfig) -> int:
    """Half of a model's experts, and no fewer than a token uses."""
    whole = base.model.architecture
    return max(whole.num_experts_per_tok, whole.num_experts // 2)


_ONE_SHOT: Mapping[str, Any] = {"submodels.sync_every": None, "submodels.seed_members": 1}
_GROWN: Mapping[str, Any] = {  # the seed also gets the sub-models' tokens, which shows what sub-models add
    **_WHOLE,
    "tokens.seed_share": lambda base: 1.0 - base.tokens.finetune_share,
    "tokens.finetune_share": lambda base: base.tokens.finetune_share,
    "submodels.optimizer.batch_tokens": lambda base: base.finetune.optimizer.batch_tokens,
    **_ONE_SHOT,
}
"""A seed that is grown into the whole MoE, without sub-models. It is one training, with the whole MoE's batches."""
_JOINT: Mapping[str, Any] = {
    **_WHOLE,
    "tokens.seed_share": 0.0,
    "tokens.finetune_share": 1.0,
    "finetune.optimizer.lr": _whole_rate,
    "finetune.optimizer.schedule": _whole_schedule,
}

OWN_DECAY: Mapping[str, Mapping[str, Any]] = {
    "submodels": {"schedule": "constant", "warmup": 0.02},
    "finetune": {"schedule": "cosine", "warmup": 0.03},
}
"""A constant rate, and a fine-tune that warms up and decays by itself: for methods whose fine-tune begins with new
moments, and for published cells with AdamW, which were measured so."""


def _own_fine_tune(base: RunConfig) -> float:
    return base.finetune.optimizer.lr / (2 if base.finetune.optimizer.schedule == "run_cosine" else 1)


_RESTARTED: Mapping[str, Any] = {
    **{f"{section}.optimizer.{name}": value for section, values in OWN_DECAY.items() for name, value in values.items()},
    "finetune.optimizer.lr": _own_fine_tune,
}
_FRESH: Mapping[str, Any] = {"submodels.keep_optimizer_state": False, "finetune.keep_optimizer_state": False}
_PLAIN_MERGE: Mapping[str, Any] = {"merge.backbone": "uniform", "merge.router": "random"}

REFERENCE = "joint"
"""The arm that all others are compared with."""

ARMS: Mapping[str, Arm] = {
    REFERENCE: Arm("joint, high-memory pool", _JOINT),
    "joint-low": Arm("joint, low-memory pool", {**_JOINT, "finetune.pool": "low_memory"}),
    "half": Arm(
        "joint, half of the experts, low-memory pool",
        {**_JOINT, "finetune.pool": "low_memory", "model.config.num_experts": half_of_experts},
    ),
    "disco": Arm("MoE-DisCo, as configured", {}),
    "paper": Arm(
        "MoE-DisCo, as the paper",
        {
            "tokens.seed_share": 0.0,
            "tokens.finetune_share": 0.194,
            "clusters.vectors": "mean_token",
            "clusters.capacity": None,
            "submodels.optimizer.name": "adamw",
            "submodels.optimizer.schedule": "constant",
            "submodels.optimizer.warmup": 0.0,
            "finetune.optimizer.name": "adamw",
            "finetune.optimizer.schedule": "cosine",
            "finetune.optimizer.warmup": 0.03,
            **_ONE_SHOT,
            **_PLAIN_MERGE,
            "merge.backbone": "token_weighted",
            **_FRESH,
            "finetune.optimizer.lr": _whole_rate,
            "finetune.load_balance": 0.0,
            "finetune.z_loss": 0.0,
        },
    ),
    "upcycle": Arm("sparse upcycling", {**_GROWN, "clusters.count": lambda base: base.model.architecture.num_experts}),
    # Expert Upcycling (arXiv 2604.19835), without its choice of experts by gradient norm.
    "expert-upcycling": Arm("Expert Upcycling", {**_GROWN, "clusters.count": _small_moes}),
    "btx": Arm("BTX", {**_ONE_SHOT, **_PLAIN_MERGE, **_FRESH, **_RESTARTED}),
    "random-clusters": Arm("MoE-DisCo, random clusters", {"clusters.vectors": "random"}),
    "ensemble": Arm(
        # The ensemble's temperature is set for distances of tf-idf vectors.
        "c-BTM ensemble",
        {"tokens.finetune_share": 0.0, "clusters.vectors": "tfidf_svd", **_ONE_SHOT},
        "ensemble",
    ),
}


def chosen(names: Sequence[str]) -> dict[str, Arm]:
    """The named arms, the reference first; all arms if no name is given.

    Raises:
        ConfigError: There is no such arm.
    """
    for name in names:
        if name not in ARMS:
            raise ConfigError("--arms", name, f"no such arm; there are {', '.join(ARMS)}")
    wanted = {REFERENCE, *(names or ARMS)}
    return {name: arm for name, arm in ARMS.items() if name in wanted}


def run_name(arm: str, budget: Budget) -> str:
    """Name of an arm's run and of its directory."""
    return f"{arm}-{budget}"


def arm_config(base: RunConfig, name: str, arm: Arm, output: Location, budget: Budget, tokens: int) -> RunConfig:
    """The configuration of one arm's run.

    Raises:
        ConfigError: The base configuration does not allow the arm.
    """
    raw = base.model_dump(mode="json")
    for path, value in arm.settings.items():
        put(raw, path, value(base) if callable(value) else value)
    put(raw, "tokens.total", tokens)
    merged = "never" if Tokens.model_validate(raw["tokens"]).decoupled else "auto"
    put(raw, "export.keep_apart", "always" if arm.measured == "ensemble" else merged)
    raw |= {"name": run_name(name, budget), "output": str(output)}
    if raw["evaluation"]["every_tokens"] is None:
        raw["evaluation"]["every_tokens"] = max(1, base.tokens.total // _MEASUREMENTS)
    return check_config(raw)


def tokens_for(
    base: RunConfig,
    arm: Arm,
    budget: Literal["tokens", "dollars"],
    reads: Callable[[RunConfig, Arm], Reads],
    reference: Arm = ARMS[REFERENCE],
) -> int:
    """Tokens at which an arm's tokens, or its planned dollars, equal joint training's on `base.tokens.total` tokens.

    Both hold up to the batch that each phase rounds down to.

    Dollars include everything in the account: joint training's dollars first pay the arm's clustering, merge and
    evaluation, and the rest pays its training tokens.

    Args:
        base: Base configuration.
        arm: Arm to train.
        budget: Quantity that is equal to joint training's.
        reads: Returns the tokens that an arm's run reads outside its training; used only for dollars.
        reference: Arm of joint training.

    Raises:
        ConfigError: The base configuration does not allow the arm, its training costs nothing, or joint training's
            total cost does not even pay for the tokens that the arm reads outside its training.
    """
    if budget == "tokens":
        return base.tokens.total
    budgeted = _dollars(base, reference, base.tokens.total, reads)
    # Secant method: dollars are nearly linear in the tokens, except for reading that does not depend on the length.
    (before, spent), tokens = (base.tokens.total, _dollars(base, arm, base.tokens.total, reads)), 2 * base.tokens.total
    for _ in range(_SECANT_STEPS):
        now = _dollars(base, arm, tokens, reads)
        if now == spent:
            raise ConfigError(
                "pools", None, "an arm costs nothing, so no other can cost the same; give the pools prices"
            )
        step = round((budgeted - now) * (tokens - before) / (now - spent))
        before, spent, tokens = tokens, now, tokens + step
        if tokens < 1:
            raise ConfigError(
                "tokens.total",
                base.tokens.total,
                f"joint training on these tokens costs less than {arm.title} before it trains; raise it, or leave the "
                "arm out",
            )
        if not step:
            break
    return tokens


def _dollars(base: RunConfig, arm: Arm, tokens: int, reads: Callable[[RunConfig, Arm], Reads]) -> float:
    # A run trains whole batches, so its dollars rise in steps, which a secant cannot follow: price the tokens before
    # rounding.
    config = _at(base, arm, tokens)
    phases = account(config, build_plan(config), reads(config, arm))
    return sum(
        phase.dollars if phase.steps is None else phase.dollars * getattr(config.tokens, phase.stage) / phase.tokens
        for phase in phases
    )


def predicted(runs: Sequence[tuple[int, float]], loss: float) -> int | None:
    """Predicted tokens of a run that reaches a loss, by a straight line of loss over log tokens.

    Because the learning rate decays at the end, only final losses are used, not the intermediate losses of a longer
    run. If even the shortest run is better than needed, the line is extended down to half of its tokens.

    Args:
        runs: Tokens and final loss of complete runs.
        loss: Loss to reach (nats per token).

    Returns:
        Tokens; None if no run reached the loss, if there is only one run, if more tokens did not lower the loss, or if
        a run has this length already (within 1 %).
    """
    ordered = sorted(runs)
    enough = next((i for i, (_, reached) in enumerate(ordered) if reached <= loss), None)
    if enough is None or len(ordered) < 2:
        return None
    (few, worse), (many, better) = ordered[max(enough, 1) - 1 :][:2]
    if better >= worse:
        return None
    tokens = round(few * (many / few) ** max((worse - loss) / (worse - better), math.log(0.5) / math.log(many / few)))
    return None if any(abs(math.log(tokens / there)) < _EQUAL_LENGTH for there, _ in ordered) else tokens


def planned(base: RunConfig, arm: Arm) -> Plan:
    """The plan of an arm at the base configuration's tokens."""
    return build_plan(_at(base, arm, base.tokens.total))


def _at(base: RunConfig, arm: Arm, tokens: int) -> RunConfig:
    return arm_config(base, "arm", arm, base.output, "tokens", tokens)


_SECANT_STEPS = 4
_EQUAL_LENGTH = 0.01
"""Maximum log ratio of the tokens of two runs that count as equally long."""
_MEASUREMENTS = 40
"""Measurements of the held-out loss over the configured tokens, if the configuration does not set their interval."""
