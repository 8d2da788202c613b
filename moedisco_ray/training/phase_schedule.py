"""What learns in which step of a training, at what rate, and through how many experts a token passes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from torch import nn

from moedisco_ray.core.config import Optimizer, Phase
from moedisco_ray.models import ModelMap, Role
from moedisco_ray.training import objective
from moedisco_ray.training.schedule import learning_rate

_LEARNS: dict[str, frozenset[Role]] = {
    "router": frozenset({Role.ROUTER}),
    "backbone": frozenset(Role) - {Role.EXPERT},
    "all": frozenset(Role),
}


@dataclasses.dataclass(frozen=True)
class PhaseSpan:
    """The steps of a phase: those from `start` on, before `stop`.

    Attributes:
        train: What learns, as in `config.Phase`.
        start: First step, counted from 0.
        stop: The step after the last.
    """

    train: str
    start: int
    stop: int


def phase_spans(phases: Sequence[Phase], steps: int) -> list[PhaseSpan]:
    """Cut a training's steps into its phases; one whose share is less than half a step may have none.

    Args:
        phases: With shares that add up to 1; none: everything learns all the time.
        steps: Of the whole training.
    """
    found: list[PhaseSpan] = []
    share = 0.0
    for phase in phases or (Phase(train="all", share=1.0),):
        share += phase.share
        start = found[-1].stop if found else 0
        found.append(PhaseSpan(phase.train, start, round(share * steps)))
    return [stretch for stretch in found if stretch.stop > stretch.start]


def rate(step: int, steps: int, stretch: PhaseSpan, optimizer: Optimizer) -> float:
    """The learning rate of a step: the whole training's schedule, times a linear warm-up of each phase but the first.

    Args:
        step: Counted from 0.
        steps: Of the whole training.
        stretch: Holds the step.
        optimizer: Its `lr`, `schedule` and `warmup`, the last as a share of the phase's steps.
    """
    whole = learning_rate(step, steps, optimizer)
    ramp = math.ceil(optimizer.warmup * (stretch.stop - stretch.start))
    return whole if stretch.start == 0 or not ramp else whole * min(1.0, (step - stretch.start + 1) / ramp)


class PhaseSchedule:
    """Sets a model up for each step of its training.

    Args:
        model: What is frozen in it now stays so.
        family: Its Hugging Face `model_type`.
        phases: What learns when.
        steps: Of the whole training.
        optimizer: Its learning rate.
        dense_steps: Steps, from the first, in which all experts are used.
    """

    def __init__(
        self, model: nn.Module, family: str, phases: Sequence[Phase], steps: int, optimizer: Optimizer, dense_steps: int,
    ) -> None:
        names = ModelMap(family)
        self._roles = [
            (parameter, names.role_in_memory(name, tuple(parameter.shape)))
            for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._routers = [(router, router.top_k) for router in objective.routers(model).values()]
        self._stretches = phase_spans(phases, steps)
        self._steps = steps
        self._optimizer = optimizer
        self._dense_steps = dense_steps

    @property
    def alike_from(self) -> int:
        """The step from which on steps are alike: the last phase's first, and all experts no longer used."""
        return max(self._stretches[-1].start, self._dense_steps)

    def changes_at(self, step: int) -> bool:
        """Whether a step is the first after some of another kind: of another phase, or with fewer experts."""
        return step > 0 and (step == self._dense_steps or any(each.start == step for each in self._stretches))

    def recall(self, done: int, *, all_began: bool) -> None:
        """Let everything learn that a checkpoint after `done` steps has moments of.

        Args:
            done: Steps made.
            all_began: Whether all began with moments of another training's; otherwise only what has learnt has any.
        """
        learnt = frozenset().union(*(_LEARNS[each.train] for each in self._stretches if each.start < done))
        self._let_learn(_LEARNS["all"] if all_began else learnt)

    def enter(self, step: int) -> float:
        """Set the model up for a step.

        Returns:
            The step's learning rate.
        """
        stretch = next(each for each in self._stretches if each.start <= step < each.stop)
        self._let_learn(_LEARNS[stretch.train])
        for router, top_k in self._routers:
            router.top_k = router.num_experts if step < self._dense_steps else top_k
        return rate(step, self._steps, stretch, self._optimizer)

    def leave(self) -> None:
        """Take back what the steps changed beside the weights."""
        for router, top_k in self._routers:
            router.top_k = top_k

    def _let_learn(self, roles: frozenset[Role]) -> None:
        for parameter, role in self._roles:
            parameter.requires_grad_(role in roles)
