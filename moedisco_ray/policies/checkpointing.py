"""The checkpoint interval that minimises the cost of saving plus the cost of repeated work.

Losses of workers are modelled as memoryless. Their rate per worker-hour starts from an assumption and is measured while a run
trains: hours without a loss lower the rate and lengthen the interval. The interval is Daly's second estimate (J. T. Daly, "A
higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation Computer Systems 22, 2006,
equation 37). For cheap checkpoints it equals Young's sqrt(2 d M) (J. W. Young, "A first order approximation to the optimum
checkpoint interval", Communications of the ACM 17, 1974), with the cost d of a checkpoint and the mean time M between losses.

A checkpoint that is written while training continues costs only the time for which training stands still. The latency until it is
stored changes the expected cost, but hardly the best interval (N. H. Vaidya, "Impact of checkpoint latency on overhead ratio of a
checkpointing scheme", IEEE Transactions on Computers 46, 1997); it is a lower bound of the interval.
"""

from __future__ import annotations

import dataclasses
import math

HOUR = 3600.0


@dataclasses.dataclass(frozen=True)
class Prior:
    """Assumed loss rate of a pool before measurements.

    Attributes:
        per_hour: Lost workers per worker-hour.
        hours: Weight of the assumption, in observed worker-hours.
    """

    per_hour: float = 0.1
    hours: float = 10.0


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Bounds of the interval (s).

    Attributes:
        shortest: Lower bound; more frequent saves only load the storage.
        longest: Upper bound; it limits the work lost with a worker.
        stall: Maximum share of the time in which training may stand still.
    """

    shortest: float = 15.0
    longest: float = 1800.0
    stall: float = 0.05


@dataclasses.dataclass(frozen=True)
class SaveCost:
    """Measured cost of a checkpoint.

    Attributes:
        stall: Time for which training stands still (s).
        latency: Time until the checkpoint is stored, the stall included (s); None: the same as `stall`.
    """

    stall: float
    latency: float | None = None


ASSUMED = Prior()
USUAL = Bounds()


def loss_rate(losses: int, worker_hours: float, prior: Prior = ASSUMED) -> float:
    """Lost workers per worker-hour: the mean of the gamma posterior, which is above 0 even if no worker was lost.

    Args:
        losses: Number of lost workers that cost work. An announced loss that was used for a checkpoint costs none.
        worker_hours: Observed time, summed over workers.
        prior: Loss rate assumed before measurements.
    """
    return (losses + prior.per_hour * prior.hours) / (worker_hours + prior.hours)


def best_interval(stall: float, mean_time: float) -> float:
    """Best time between two checkpoints by Daly's estimate (s).

    Args:
        stall: Cost of a checkpoint (s).
        mean_time: Mean time between two losses of a worker, over all workers of this training (s).
    """
    if math.isinf(mean_time):
        return math.inf
    if stall >= 2 * mean_time:
        return mean_time
    ratio = stall / (2 * mean_time)
    return math.sqrt(2 * stall * mean_time) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall


def interval(cost: SaveCost, losses_per_hour: float, workers: int = 1, bounds: Bounds = USUAL) -> float:
    """Best time between two checkpoints, within bounds (s).

    Args:
        cost: Cost of a checkpoint.
        losses_per_hour: Loss rate of one worker (`loss_rate`).
        workers: Number of workers of this training; the loss of one stops all.
        bounds: Bounds; `stall` overrules `longest`, which overrules `shortest`.
    """
    rate = losses_per_hour * workers
    best = best_interval(cost.stall, HOUR / rate if rate > 0 else math.inf)
    within = min(max(best, bounds.shortest), bounds.longest)
    # The share of stalls is s = d / (t + d). A checkpoint starts only after the last one is stored.
    return max(within, cost.stall * (1 / bounds.stall - 1), cost.latency or 0.0)


def interval_steps(seconds: float, step_seconds: float, steps: int) -> int:
    """The interval in whole steps, between 1 and all steps of the training."""
    return steps if seconds >= steps * step_seconds else max(1, round(seconds / step_seconds))


def expected_stretch(interval_seconds: float, stall: float, mean_time: float, restart: float = 0.0) -> float:
    """Expected wall-clock time, relative to a training without lost workers and checkpoints.

    Daly's complete model (equation 20 of the same article), per second of work.

    Args:
        interval_seconds: Training time between two checkpoints (s).
        stall: Cost of a checkpoint (s).
        mean_time: Mean time between two losses of a worker (s).
        restart: Time from a loss until training continues (s).
    """
    if math.isinf(mean_time):
        return (interval_seconds + stall) / interval_seconds
    exponent = (interval_seconds + stall) / mean_time
    if exponent + restart / mean_time > 600:   # more than a float holds: such a training never ends
        return math.inf
    return mean_time / interval_seconds * math.exp(restart / mean_time) * math.expm1(exponent)
