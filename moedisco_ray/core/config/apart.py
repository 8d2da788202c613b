"""When the sub-models of a run may stay apart as an ensemble, and what decides it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from moedisco_ray.core.config.inits import LocalInit
from moedisco_ray.core.families import DECLARATIONS

if TYPE_CHECKING:
    from moedisco_ray.core.config.run import RunConfig

ApartChoice = Literal["auto", "always", "never"]
"""What decides whether sub-models stay apart: what is measured, or a rule."""


def apart_choice(config: RunConfig) -> ApartChoice:
    """What decides in a run whether its sub-models stay apart.

    `auto` only where it is open: in a run with sub-models that starts from a trained model, and whose sub-models can be
    an ensemble. Merging experts that learnt from random weights on parts of one text has cost nothing that was
    measured.
    """
    asked = config.export.keep_apart
    is_open = isinstance(config.model.init, LocalInit) and without_ensemble(config) is None
    return "never" if asked == "auto" and not is_open else asked


def without_ensemble(config: RunConfig) -> str | None:
    """Why the sub-models of a run cannot be an ensemble, as a predicate with the remedy left out; None if they can."""
    if not config.tokens.decoupled:
        return "has no sub-models, since seed_share and finetune_share are 1 together"
    if config.owners:
        return "has sub-models of data owners, whose clusters have no centre to route by"
    if config.clusters.vectors == "random":
        return "has clusters of the kind random, which have no centre to route by"
    if not config.model.known or config.clusters.count == "auto":
        return None  # asked again when both are known
    family = DECLARATIONS[config.model.family_name]
    experts = config.model.architecture.num_experts // config.clusters.count
    if experts < family.router.least_in_group:
        return f"has sub-models with {experts} expert, with which transformers cannot run {family.name}"
    return f"has sub-models of {family.name}, which transformers does not have" if family.module is not None else None


def check_apart(config: RunConfig) -> None:
    """Check that a run whose setting says something about its sub-models has some, and that they can stay apart.

    Raises:
        ValueError: It has none, or they cannot; the message begins with the setting.
    """
    asked = config.export.keep_apart
    if asked == "auto":
        return
    if not config.tokens.decoupled:
        raise ValueError(
            f"export.keep_apart {asked!r} needs sub-models: lower seed_share and finetune_share to less than 1 "
            "together, or leave it out"
        )
    if asked == "always" and (reason := without_ensemble(config)) is not None:
        raise ValueError(f"export.keep_apart 'always' is impossible: the run {reason}; leave it out")
