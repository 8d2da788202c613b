"""Training of the whole model by members on machines of their own, which exchange what their weights change by.

One card of each machine holds the whole model, or the machine's main memory does. The members divide the batch of joint
training among them, and combine their weights every few steps, in 4 bits per weight. So the network carries a small
part of what workers that exchange gradients in every step send. How much higher the loss ends is not known at the size
of real models.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from moedisco_ray.core.config import Lora, LowMemoryPool, Optimizer, Outer, Residence, RunConfig, UpcycleInit
from moedisco_ray.core.records.ways import exact_first
from moedisco_ray.plan.joint_ways import Change, Joint, Planner, card_name, on_known_machine, tried, usual_types
from moedisco_ray.policies.gang import counts

_SYNC_EVERY = 16
_SYNC_BITS = 4
_MUON_OUTER = Outer(lr=0.7, momentum=0.6)
"""Outer step of members that train with Muon (MuLoCo, arXiv 2505.23725)."""


def members_way(config: RunConfig, plan: Planner) -> Joint | str:
    """Training by as many members as the low-memory pool has machines; a text if the configuration has no place for it.

    Args:
        config: The configuration, with a number of clusters.
        plan: Function that plans another configuration.
    """
    low = config.pools.low_memory
    kind = usual_types(low)[-1]
    batch, length = config.finetune.optimizer.batch_tokens, config.corpus.sequence_length
    members = max(counts(batch // length, 1, min(kind.max_workers, low.max_workers)))
    reasons = (
        (
            isinstance(config.model.init, UpcycleInit),
            "members train from random weights or from a trained MoE; set model.init to random or to a checkpoint",
        ),
        (bool(config.owners), "data owners need sub-models"),
        (not kind.gpu, "members train on cards; set pools.low_memory.gpu"),
        (
            kind.gpus_per_node > 1,
            f"members have a machine each, and pools.low_memory.gpus_per_node is {kind.gpus_per_node}; set it to 1",
        ),
        (members == 1, "members divide the batch of the fine-tune on two machines or more; raise max_workers"),
    )
    for applies, reason in reasons:
        if applies:
            return reason
    found = _members(config, plan, kind, members, kind.memory)
    if (found.fits and not found.rounded) or kind.memory == "streamed":
        return found
    streamed = _members(config, plan, kind, members, "streamed")
    if fitting := [each for each in (found, streamed) if each.fits]:
        return min(exact_first(fitting), key=lambda each: each.cost)
    if isinstance(found.trial, str):
        return found
    limit = f"{found.trial.limit}; with the weights in main memory: {streamed.limit}"
    return dataclasses.replace(found, trial=dataclasses.replace(found.trial, limit=limit))


def _members(config: RunConfig, plan: Planner, kind: LowMemoryPool, members: int, memory: Residence) -> Joint:
    change = _change(config, kind, members, memory)
    trial = tried(config, plan, change)
    name = f"{members} members on {members} x {card_name(kind)}"
    if memory == "streamed":
        name += ", streamed from main memory"
        trial = on_known_machine(config, plan, change, trial, kind, section="submodels")
    name += f", in step every {_SYNC_EVERY} steps"
    return Joint("members", size=members, nodes=members, name=name, change=change, trial=trial)


def _change(config: RunConfig, kind: LowMemoryPool, members: int, memory: Residence) -> Change:
    """The settings that make a run of it: the seed is the whole model, and what follows it leaves it as it is."""
    optimizer = _optimizer(config.finetune.optimizer, members)
    settings: Mapping[str, Any] = {"max_workers": members, "seed_workers": 1, "types": (), "memory": memory}
    return {
        "tokens": {"seed_share": 1, "finetune_share": 0},
        "clusters": {"count": 1},
        "submodels": {
            "optimizer": optimizer.model_dump(),
            "lora": Lora().model_dump(),
            "sync_every": _SYNC_EVERY,
            "sync_bits": _SYNC_BITS,
            "outer": (_MUON_OUTER if optimizer.name == "muon" else Outer()).model_dump(),
            "seed_members": members,
            "quorum": None,
        },
        "merge": {"router": "kept"},
        "finetune": {"pool": kind.name},
        "export": {"keep_apart": "auto"},
        "pools": {kind.name: kind.model_dump(exclude={"type_name"}) | dict(settings)},
    }


def _optimizer(joint: Optimizer, members: int) -> Optimizer:
    """The optimizer of a member.

    Its part of the batch has more noise. The mean of M members at a rate has the noise of one at the rate / sqrt(M).
    """
    rate = float(f"{joint.lr * math.sqrt(members):.6g}")
    return joint.model_copy(update={"batch_tokens": joint.batch_tokens // members, "lr": rate})
