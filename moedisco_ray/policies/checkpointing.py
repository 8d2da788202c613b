"""The checkpoint interval that minimises the cost of saving plus the cost of repeated work.

Losses of workers are modelled as memoryless. Their rate per worker-hour starts from an assumption and is measured while
a run trains: hours without a loss lower the rate and lengthen the interval. The interval is Daly's second estimate (J.
T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation Computer
Systems 22, 2006, equation 37). For cheap checkpoints it equals Young's sqrt(2 d M) (J. W. Young, "A first order
approximation to the optimum checkpoint interval", Communications of the ACM 17, 1974), with the cost d of a checkpoint
and the mean time M between losses.

A checkpoint that is written while training continues costs only the time for which training stands still. The latency
until it is stored changes the expected cost, but hardly the best interval (N. H. Vaidya, "Impact of checkpoint latency
on overhead ratio of a checkpointing scheme", IEEE Transactions on Computers 46, 1997). The interval is at least this
latency.
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
        hours: Weight of the assumption: it counts as much as this many observed worker-hours.
    """

    per_hour: float = 0.1
    hours: float = 10.0


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Bounds of the interval between checkpoints.

    Attributes:
        shortest: Lower bound in seconds; saving more often would only burden the storage.
        longest: Upper bound in seconds; it limits how much work is lost with a worker.
        stall: Maximum share of the time in which training may stand still.
    """

    shortest: float = 15.0
    longest: float = 1800.0
    stall: float = 0.05


@dataclasses.dataclass(frozen=True)
class SaveCost:
    """Measured cost of a checkpoint.

    Attributes:
        stall: Seconds for which training stands still.
        latency: Seconds until the checkpoint is stored, including the stall. None means that the checkpoint is stored
            when the stall ends.
    """

    stall: float
    latency: float | None = None


ASSUMED = Prior()
USUAL = Bounds()


def loss_rate(losses: int, worker_hours: float, prior: Prior = ASSUMED) -> float:
    """Lost workers per worker-hour: the mean of the gamma posterior, which is above 0 even if no worker was lost.

    Args:
        losses: Number of lost workers whose work was lost too. If a loss was announced in time for a checkpoint, it
            does not count.
        worker_hours: Observed hours, summed over workers.
        prior: Loss rate assumed before measurements.
    """
    return (losses + prior.per_hour * prior.hours) / (worker_hours + prior.hours)


def best_interval(stall: float, mean_time: float) -> float:
    """Best time between two checkpoints in seconds, by Daly's estimate.

    Args:
        stall: Seconds that a checkpoint costs.
        mean_time: Mean seconds between two losses of a worker, over all workers of this training.
    """
    if math.isinf(mean_time):
        return math.inf
    if stall >= 2 * mean_time:
        return mean_time
    ratio = stall / (2 * mean_time)
    return math.sqrt(2 * stall * mean_time) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall


def interval(cost: SaveCost, losses_per_hour: float, workers: int = 1, bounds: Bounds = USUAL) -> float:
    """Best time between two checkpoints in seconds, within bounds.

    Args:
        cost: Cost of a checkpoint.
        losses_per_hour: Loss rate of one worker (`loss_rate`).
        workers: Number of workers of this training; the loss of one stops all.
        bounds: Bounds of the interval. If they contradict each other, `stall` overrules `longest`, which overrules
            `shortest`.
    """
    rate = losses_per_hour * workers
    best = best_interval(cost.stall, HOUR / rate if rate > 0 else math.inf)
    within = min(max(best, bounds.shortest), bounds.longest)
    # With a stall of d after every t seconds of training, stalls take the share d / (t + d) of the time. A checkpoint
    # starts only after the previous one is stored, so the interval is at least the latency.
    return max(within, cost.stall * (1 / bounds.stall - 1), cost.latency or 0.0)


def expected_stretch(interval_seconds: float, stall: float, mean_time: float, restart: float = 0.0) -> float:
    """Expected wall-clock time, relative to a training without lost workers and checkpoints.

    Daly's complete model (equation 20 of the same article), per second of work.

    Args:
        interval_seconds: Seconds of training between two checkpoints.
        stall: Seconds that a checkpoint costs.
        mean_time: Mean seconds between two losses of a worker.
        restart: Seconds from a loss until training continues.
    """
    if math.isinf(mean_time):
        return (interval_seconds + stall) / interval_seconds
    exponent = (interval_seconds + stall) / mean_time
    if exponent + restart / mean_time > 600:  # the result would be too large for a float; such a training never ends
        return math.inf
    return mean_time / interval_seconds * math.exp(restart / mean_time) * math.expm1(exponent)
