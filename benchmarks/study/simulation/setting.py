"""Settings of a simulation: sub-models, machines, and how machines are lost.

Loss rates, per machine-hour:

* AWS Spot Instance Advisor groups instance types by the share of machines interrupted within a month, from below 5 % to
  above 20 %. Spread evenly over a month, 5 % are 7e-5 per hour and 20 % are 3.1e-4.
* The traces published with Wu et al., "Can't Be Late: Optimizing Spot Instance Savings under Deadlines" (NSDI 2024;
  skypilot-org/spot-traces, commit 221da1a) give the number of running spot V100 machines over time. The seven V100
  preemption traces have 0.06 to 0.74 losses per machine-hour (median 0.44), and a lost machine was replaced after 0.8
  to 6.3 hours on average (median 1.2).
* Machines of one type and zone are lost together: within three minutes in over 92 % of cases (Spot-and-Scoot, arXiv
  2604.16457). `Setting.together` takes that into account.

Boot times: Mao and Humphrey, "A Performance Study on the VM Startup Time in the Cloud" (IEEE CLOUD 2012), measured 97
seconds on average for Linux on EC2, and longer and more varied times for spot machines. Pulling an image with CUDA and
PyTorch and starting Ray take further time. We assume a log-normal total with a median of 240 seconds.
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
        name: Tag of the type.
        memory_gb: Memory of a worker (GB).
        price: Price (dollars per hour).
        speed: Speed relative to the pool's usual type.
        machines: Number of machines on the market.
    """

    name: str
    memory_gb: float
    price: float
    speed: float
    machines: int


@dataclasses.dataclass(frozen=True)
class Setting:
    """One scenario. Times are in seconds unless the name contains another unit.

    Attributes:
        submodels: Number of sub-models.
        mean_hours: Mean training time of a sub-model on one machine.
        spread: Standard deviation of the logarithm of the training time.
        large_share: Share of the sub-models that need a machine with more than 24 GB.
        kinds: Node types of the pool.
        at_once: Maximum number of machines held at once.
        losses_per_hour: Loss rate of one machine.
        together: Share of a zone's machines that are lost together; 0: machines are lost independently.
        zones: Number of zones over which the machines are spread.
        notice: Time between the notice and the loss.
        heard: Share of the losses whose notice is heard.
        failures_per_hour: Rate of worker failures caused by the program.
        outage_hours: Mean time until a lost machine is replaced.
        boot: Median time from the request for a machine to its first work.
        restart: Time from a worker's start to its first step: process, weights, optimizer.
        stall: Time for which each checkpoint stops training.
        latency: Time until a checkpoint is safe in storage.
        every: Time between checkpoints; None uses the product's own interval.
        prior: The product's assumption about losses before it has seen any.
        bounds: Bounds of the product's checkpoint interval.
        order: Order of the sub-models: `longest_first` is the product's, `as_given` that of the clusters.
        ask: When the expensive nodes are requested: `in_time` is the product's policy; `at_start` and `at_end` are
            alternatives.
        gang: Number of expensive nodes.
        gang_price: Price of one expensive node (dollars per hour).
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
    gang: int = 8
    gang_price: float = 2.28


@dataclasses.dataclass(frozen=True)
class Work:
    """A sub-model: its true and planned seconds per step on a machine of speed 1, and the memory it needs."""

    name: str
    steps: int
    step_seconds: float
    planned_step_seconds: float
    memory_gb: float

    @property
    def seconds(self) -> float:
        return self.steps * self.step_seconds


def submodels(setting: Setting, seed: int) -> list[Work]:
    """Sub-models of unequal size; their planned step times are about 30 % too low on average and vary by 10 %."""
    rng = random.Random(f"work {seed}")
    works = []
    for k in range(setting.submodels):
        hours = setting.mean_hours * rng.lognormvariate(-(setting.spread**2) / 2, setting.spread)
        large = rng.random() < setting.large_share
        step = 1.3 * rng.lognormvariate(0.0, 0.1)
        works.append(Work(f"submodel-{k}", max(1, round(hours * HOUR / step)), step, 1.0, 40.0 if large else 20.0))
    return works
