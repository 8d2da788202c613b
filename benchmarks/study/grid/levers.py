"""Arms of the grid that change one lever of the recipe; a grid measures only those that `--arms` names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.study.compare.arms import ARMS, OWN_DECAY, REFERENCE, Arm
from moedisco_ray.core.config import RunConfig


def _twice(base: RunConfig) -> int:
    return 2 * base.cluster_count


_SMALL: Mapping[str, Any] = {
    "clusters.count": _twice,
    "pools.low_memory.max_workers": _twice,
    "pools.low_memory.seed_workers": _twice,
}
_ADAMW: Mapping[str, Any] = {
    f"{section}.optimizer.{name}": value
    for section, values in OWN_DECAY.items()
    for name, value in {"name": "adamw", **values}.items()
}
_HALF: Mapping[str, Any] = {"finetune.optimizer.lr": lambda base: base.finetune.optimizer.lr / 2}
_ALONE: Mapping[str, Any] = {
    "finetune.optimizer.schedule": lambda base: "wsd" if base.model.init == "random" else "cosine"
}

LEVERS: Mapping[str, Arm] = {
    "joint-wsd": Arm(
        "joint, rate falls in its last fifth",
        {**ARMS[REFERENCE].settings, "finetune.optimizer.schedule": "wsd", "finetune.optimizer.warmup": 0.03},
    ),
    "small-groups": Arm("ours, twice as many sub-models of half as many experts", _SMALL),
    "longer-finetune": Arm(
        "ours, a fifth of the tokens in the fine-tune", {"tokens.seed_share": 0.65, "tokens.finetune_share": 0.2}
    ),
    "no-syncs": Arm("ours, sub-models never sync", {"submodels.sync_every": None}),
    "random-router": Arm("ours, random directions in the merged routers", {"merge.router": "random"}),
    "fresh-states": Arm(
        "ours, phases begin without optimizer state",
        {"submodels.keep_optimizer_state": False, "finetune.keep_optimizer_state": False},
    ),
    "early-growth": Arm(
        "Expert Upcycling, grown at half of the tokens",
        {**ARMS["expert-upcycling"].settings, "tokens.seed_share": 0.5, "tokens.finetune_share": 0.5},
    ),
}
WITH_ADAMW: Mapping[str, Arm] = {
    f"{name}-adamw": Arm(f"{title}, AdamW", {**arm.settings, **_ADAMW, **(_ALONE if name == REFERENCE else _HALF)})
    for name, title, arm in (
        (REFERENCE, "joint", ARMS[REFERENCE]),
        ("disco", "ours", ARMS["disco"]),
        ("small-groups", LEVERS["small-groups"].title, LEVERS["small-groups"]),
        ("expert-upcycling", ARMS["expert-upcycling"].title, ARMS["expert-upcycling"]),
        ("upcycle", ARMS["upcycle"].title, ARMS["upcycle"]),
    )
}
"""Arms with AdamW for all parameters and a constant rate before the fine-tune, the default before Muon."""

KNOWN: Mapping[str, Arm] = {**ARMS, **LEVERS, **WITH_ADAMW}
"""Every arm that a grid can measure."""
