"""Rules for data owners: what is theirs alone, and what a run needs of text without an owner."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING

from moedisco_ray.core.store.locations import Location, is_uri

if TYPE_CHECKING:
    from moedisco_ray.core.config.run import RunConfig


def check_owners(config: RunConfig) -> None:
    """Check that the owners have text, storage and seats of their own, and that the run can do without the rest.

    Raises:
        ValueError: The first mistake; the message begins with the setting.
    """
    owners = config.pools.owners
    for i, source in enumerate(config.corpus.sources):
        if source.owner is not None and source.owner not in owners:
            raise ValueError(
                f"corpus.sources.{i}.owner {source.owner!r} is not in pools.owners; add it there, with storage and "
                "resource"
            )
    for name in owners:
        if not config.corpus.of_owner(name):
            raise ValueError(
                f"pools.owners.{name} has no text; give a source of the corpus `owner: {name}`, or remove it"
            )
    if not config.corpus.of_owner(None):
        raise ValueError(
            "corpus.sources all have an owner, but tokenizer, clusters, routers, fine-tune and evaluation need text "
            "without one; add a source"
        )
    if owners:
        _check_places(config)
        _check_seats(config)
        _check_stages(config)


def _check_places(config: RunConfig) -> None:
    owned: dict[str, Location] = {
        f"pools.owners.{name}.storage": owner.storage for name, owner in config.pools.owners.items()
    }
    others = {"output": config.output, "checkpoint.storage": config.checkpoint.storage}
    places = owned | {field: place for field, place in others.items() if place is not None}
    for (field, one), (other, two) in itertools.combinations(places.items(), 2):
        if field in owned and _overlap(one, two):
            raise ValueError(
                f"{field} {str(one)!r} overlaps with {other} {str(two)!r}; give each owner a folder of its own"
            )


def _overlap(one: Location, two: Location) -> bool:
    first, second = map(_folder, (one, two))
    return first.startswith(second) or second.startswith(first)


def _folder(place: Location) -> str:
    path = str(place).partition("?")[0] if is_uri(place) else os.path.normpath(Path(place).absolute())
    return path.rstrip("/") + "/"


def _check_seats(config: RunConfig) -> None:
    taken = {tag: pool.path for pool in (config.pools.low_memory, config.pools.high_memory) for tag in pool.tags}
    for name, owner in config.pools.owners.items():
        if owner.resource in taken:
            raise ValueError(
                f"pools.owners.{name}.resource {owner.resource!r} is also a resource of {taken[owner.resource]}; give "
                "the owner's nodes their own"
            )
        taken[owner.resource] = f"pools.owners.{name}"


def _check_stages(config: RunConfig) -> None:
    if not config.tokens.decoupled:
        raise ValueError("pools.owners need sub-models: lower seed_share and finetune_share to less than 1 together")
    if config.clusters.count != "auto" and config.shared_clusters < 1:
        raise ValueError(
            f"clusters.count {config.clusters.count} leaves no cluster for text without an owner, because each owner "
            f"has one; use at least {len(config.owners) + 1}"
        )
    if config.submodels.quorum is not None:
        raise ValueError(
            f"submodels.quorum {config.submodels.quorum} needs the checkpoints of unfinished sub-models, and an "
            "owner's stay with the owner; leave it out"
        )
    if config.finetune.keep_optimizer_state and config.tokens.finetune:
        raise ValueError(
            "finetune.keep_optimizer_state needs the optimizer states of all sub-models, and an owner's stays with the "
            "owner; set it to false"
        )
