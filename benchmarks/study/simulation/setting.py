"""What is simulated: sub-models, machines, and how they are lost.

Loss rates, per machine-hour:

* AWS Spot Instance Advisor sorts types into bands of how many machines were interrupted within a month, from below 5 % to
  above 20 %. Spread evenly over a month, 5 % are 7e-5 per hour and 20 % are 3.1e-4.
* The traces published with Wu et al., "Can't Be Late: Optimizing Spot Instance Savings under Deadlines" (NSDI 2024;
  skypilot-org/spot-traces, commit 221da1a) say how many spot V100 machines ran at each moment. Counted as losses over
  hours in which machines ran, the seven preemption traces of V100 give 0.06 to 0.74 per hour (median 0.44), and the place of
  a lost machine stayed empty for 0.8 to 6.3 hours in the mean (median 1.2).
* Machines of one type and zone are lost together: within three minutes in over 92 % of cases (Spot-and-Scoot, arXiv
  2604.16457). `Setting.together` takes that into account.

Boot times: Mao and Humphrey, "A Performance Study on the VM Startup Time in the Cloud" (IEEE CLOUD 2012), measured 97 seconds
in the mean for Linux on EC2, and more, with more spread, for spot machines. Pulling an image with CUDA and PyTorch, and starting
Ray, comes on top: 240 seconds in the median, log-normal, is an assumption.
"""

from __future__ import annotations

import dataclasses
import random

from moedisco_ray.policies.checkpointing import ASSUMED, USUAL, Bounds, Prior

HOUR = 3600.0

LOSS_RATES = {
    "no losses": 0.0,
    "Advisor, 5 % a month": 7.0e-5,
    "Advisor, 20 % a month": 3.1e-4,
    "traces, lowest": 0.06,
    "traces, median": 0.44,
    "traces, highest": 0.74,
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A node type of the cheap pool.

    Attributes:
        name: Its tag.
        memory_gb: Of a worker.
        price: Dollars per hour.
        speed: Relative to the pool's usual type.
        machines: How many the market has.
    """

    name: str
    memory_gb: float
    price: float
    speed: float
    machines: int


@dataclasses.dataclass(frozen=True)
class Setting:
    """One scenario. Times in seconds unless a name says otherwise.

    Attributes:
        submodels: How many.
        mean_hours: Of a sub-model's training on one machine.
        spread: Standard deviation of the logarithm of that.
        large_share: Share of the sub-models that only fit a machine of more than 24 GB.
        kinds: Node types of the pool.
        at_once: Most machines that are held at once.
        losses_per_hour: Per machine.
        together: Share of a zone that goes at once; 0: every machine for itself.
        zones: Over how many zones the machines are spread.
        notice: Between the notice, if anybody hears it, and the loss.
        heard: Share of the losses whose notice is heard.
        failures_per_hour: Ends of a worker that are the program's fault.
        outage_hours: For how long the place of a lost machine stays empty, in the mean.
        boot: Median from asking for a machine to its first work.
        restart: From a worker's start to its first step: process, weights, optimizer.
        stall: For which training stands still per checkpoint.
        latency: Until a checkpoint is safe in storage.
        every: Between checkpoints; None: the product's own interval.
        prior: What the product assumes of losses before it has seen any.
        bounds: Of the product's interval.
        order: `longest_first` is the product's; `as_given` is the clusters' order.
        ask: `in_time` is the product's; `at_start` and `at_end` are when the expensive nodes are asked for otherwise.
        quorum: How many must be finished; None: all.
        patience: With the rest, once there is a quorum.
        gang: Expensive nodes.
        gang_price: Dollars per hour for each.
    """

    submodels: int = 256
    mean_hours: float = 6.0
    spread: float = 0.5
    large_share: float = 0.0
    kinds: tuple[Kind, ...] = (Kind("24gb", 24.0, 0.35, 1.0, 1000),)
    at_once: int = 1000
    losses_per_hour: float = 0.0
    together: float = 0.0
    zones: int = 10
    notice: float = 120.0
    heard: float = 0.0
    failures_per_hour: float = 0.002
    outage_hours: float = 1.2
    boot: float = 240.0
    restart: float = 60.0
    stall: float = 2.0
    latency: float = 30.0
    every: float | None = None
    prior: Prior = ASSUMED
    bounds: Bounds = USUAL
    order: str = "longest_first"
    ask: str = "in_time"
    quorum: int | None = None
    patience: float = 1.5
    gang: int = 8
    gang_price: float = 2.28


@dataclasses.dataclass(frozen=True)
class Work:
    """A sub-model: true seconds on a machine of speed 1, what the plan said of a step, and the memory it needs."""

    name: str
    steps: int
    step_seconds: float
    planned_step_seconds: float
    memory_gb: float

    @property
    def seconds(self) -> float:
        return self.steps * self.step_seconds


def submodels(setting: Setting, seed: int) -> list[Work]:
    """Unequal, and a plan that is 30 % too rosy in the mean and 10 % off for each."""
    chance = random.Random(f"work {seed}")
    works = []
    for k in range(setting.submodels):
        hours = setting.mean_hours * chance.lognormvariate(-setting.spread**2 / 2, setting.spread)
        large = chance.random() < setting.large_share
        step = 1.3 * chance.lognormvariate(0.0, 0.1)
        works.append(Work(f"submodel-{k}", max(1, round(hours * HOUR / step)), step, 1.0, 40.0 if large else 20.0))
    return works
