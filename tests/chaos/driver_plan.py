"""When a run's driver or its Ray head is killed, and which fault its storage has: drawn from a seed."""

from __future__ import annotations

import dataclasses
import random
from typing import Literal

from faulty_s3 import Fault

Target = Literal["driver", "head"]
"""`driver`: the process of `moedisco run`. `head`: the Ray cluster's head node, on which the driver runs too."""
Stage = Literal["corpus", "seed", "submodels", "merge", "finetune"]
Store = Literal["disk"] | Fault
"""Where the run is: in a directory, or on an S3 server with a fault."""

LONGEST_DELAY = 3.0
"""Maximum time from the start of a stage without steps to the kill (s); such a stage takes about this long."""
_SEED_SHARE, _SUBMODELS_SHARE = 0.2, 0.45
_EARLIEST, _LATEST = 0.05, 0.9


@dataclasses.dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        target: What is killed.
        store: Where the run is stored.
        stage: The stage that is under way.
        share: Share of the stage's steps after which the kill comes, in a stage that trains.
        delay: Time from the start of a stage that does not train to the kill (s).
    """

    target: Target
    store: Store
    stage: Stage
    share: float = 0.0
    delay: float = 0.0

    @property
    def trains(self) -> bool:
        """Whether the stage trains, so that the moment is a share of its steps."""
        return self.stage in ("seed", "submodels", "finetune")

    def __str__(self) -> str:
        moment = f"{self.share:.0%} of {self.stage}" if self.trains else f"{self.delay:.1f} s of {self.stage}"
        return f"kill -9 of the {self.target} at {moment}, store: {self.store}"


def draw(seed: int) -> Kill:
    """The kill of a seed; seeds take turns between driver and head, and between a directory and an S3 server."""
    generator = random.Random(seed)
    target: Target = "head" if seed % 2 else "driver"
    faults: list[Fault] = ["throttle", "cut", "refuse", "slow"]
    store: Store = generator.choice(faults) if seed // 2 % 2 == 0 else "disk"
    stages: list[Stage] = ["seed", "submodels", "corpus", "merge", "finetune"]
    others = (1.0 - _SEED_SHARE - _SUBMODELS_SHARE) / 3
    stage = generator.choices(stages, [_SEED_SHARE, _SUBMODELS_SHARE, others, others, others])[0]
    kill = Kill(target, store, stage)
    if kill.trains:
        return dataclasses.replace(kill, share=generator.uniform(_EARLIEST, _LATEST))
    return dataclasses.replace(kill, delay=generator.uniform(0.0, LONGEST_DELAY))
