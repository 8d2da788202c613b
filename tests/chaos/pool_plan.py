"""How pools of spot machines change under a run: drawn from a seed, and such that the run can always continue."""

from __future__ import annotations

import dataclasses
import random
from typing import Literal

Stage = Literal["submodels", "finetune"]
Kind = Literal["power", "notice", "process", "empty", "arrival"]
"""`power`: a node is gone at once. `notice`: a node says that it will go, and goes. `process`: a trainer's worker
process is killed. `empty`: all nodes of the pool are gone at once. `arrival`: there is a node more than before."""

NODES: dict[Stage, int] = {"submodels": 2, "finetune": 1}
"""Of the pool that trains a stage, at the beginning; each has room for one worker."""
MOST_CHANGES = 3
_FINETUNE_SHARE = 0.25
_EARLIEST, _LATEST = 0.05, 0.8
_LONGEST_ABSENCE = 4.0
_FOR_GOOD = 0.4


@dataclasses.dataclass(frozen=True)
class Change:
    """One change of a pool.

    Attributes:
        kind: What happens.
        stage: Whose pool it happens to.
        share: When: once this share of the stage's steps is made.
        pick: Which of the units that train it happens to, counted round.
        absence: Seconds until a node comes for each that went; None: none comes.
    """

    kind: Kind
    stage: Stage
    share: float
    pick: int = 0
    absence: float | None = None

    def __str__(self) -> str:
        back = "" if self.absence is None else f", a node for each that went after {self.absence:.1f} s"
        return f"{self.kind} at {self.share:.0%} of {self.stage}{back}"

    def nodes_after(self, nodes: int) -> int:
        """How many nodes the pool has in the end."""
        if self.kind == "arrival":
            return nodes + 1
        if self.kind == "process" or self.absence is not None:
            return nodes
        return 0 if self.kind == "empty" else nodes - 1


def draw(seed: int) -> list[Change]:
    """A plan in which no unit loses more processes than the default settings allow, and each pool gets a node again."""
    generator = random.Random(seed)
    count = generator.randint(1, MOST_CHANGES)
    stages: list[Stage] = sorted(
        ("finetune" if generator.random() < _FINETUNE_SHARE else "submodels" for _ in range(count)), reverse=True
    )
    shares = {stage: _shares(generator, stages.count(stage)) for stage in NODES}
    nodes = dict(NODES)
    changes: list[Change] = []
    for stage in stages:
        kinds: list[Kind] = ["power", "notice", "process"]
        if stage == "submodels":
            kinds += ["empty", "arrival"]
        kind = generator.choice(kinds)
        absence = None
        if kind in ("power", "notice", "empty"):
            spared = kind != "empty" and nodes[stage] > 1
            if not (spared and generator.random() < _FOR_GOOD):
                absence = generator.uniform(0.0, _LONGEST_ABSENCE)
        changes.append(Change(kind, stage, shares[stage].pop(0), generator.randrange(8), absence))
        nodes[stage] = changes[-1].nodes_after(nodes[stage])
    return changes


def _shares(generator: random.Random, count: int) -> list[float]:
    return sorted(generator.uniform(_EARLIEST, _LATEST) for _ in range(count))
