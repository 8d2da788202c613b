"""How often to save: the interval at which saving and doing lost work again cost least together.

Losses are taken to be memoryless, at a rate per worker-hour that is measured and starts from an assumption. A training is told
of it while it runs: hours without a loss lower it, and lengthen the interval. That is Daly's second estimate (J. T. Daly, "A
higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation Computer Systems 22, 2006,
equation 37), which for cheap checkpoints is Young's sqrt(2 d M) (J. W. Young, "A first order approximation to the optimum
checkpoint interval", Communications of the ACM 17, 1974), d being what a checkpoint costs and M the mean time between losses.

A checkpoint that is written while training goes on costs only the seconds for which training stands still. How long it
takes until it is safe moves the expected cost, hardly the best interval (N. H. Vaidya, "Impact of checkpoint latency on
overhead ratio of a checkpointing scheme", IEEE Transactions on Computers 46, 1997), and bounds it from below.
"""

from __future__ import annotations

import dataclasses
import math

HOUR = 3600.0


@dataclasses.dataclass(frozen=True)
class Prior:
    """What is assumed of a pool's losses until it has been watched.

    Attributes:
        per_hour: Losses per worker-hour.
        hours: Worker-hours of watching that the assumption weighs as much as.
    """

    per_hour: float = 0.1
    hours: float = 10.0


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Between what an interval must lie, in seconds.

    Attributes:
        shortest: Below it, small files would only wear the storage.
        longest: Above it, a loss that nobody expected would hurt.
        stall: Largest share of the time for which training may stand still.
    """

    shortest: float = 15.0
    longest: float = 1800.0
    stall: float = 0.05


@dataclasses.dataclass(frozen=True)
class SaveCost:
    """What a checkpoint was measured to cost.

    Attributes:
        stall: Seconds for which training stands still.
        latency: Seconds until it is safe in storage, the stall included; None: no longer than the stall.
    """

    stall: float
    latency: float | None = None


ASSUMED = Prior()
USUAL = Bounds()


def loss_rate(losses: int, worker_hours: float, prior: Prior = ASSUMED) -> float:
    """Losses per worker-hour: the mean of the gamma posterior, so that a pool that lost nothing yet is not called safe.

    Args:
        losses: Those that cost work. One that was announced, and used for a checkpoint, cost none.
        worker_hours: For how long workers were watched, all together.
        prior: What is assumed beforehand.
    """
    return (losses + prior.per_hour * prior.hours) / (worker_hours + prior.hours)


def best_interval(stall: float, mean_time: float) -> float:
    """Seconds of training between two checkpoints, by Daly's estimate.

    Args:
        stall: Seconds that one costs.
        mean_time: Seconds between two losses of this training, which is any of its workers'.
    """
    if math.isinf(mean_time):
        return math.inf
    if stall >= 2 * mean_time:
        return mean_time
    ratio = stall / (2 * mean_time)
    return math.sqrt(2 * stall * mean_time) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall


def interval(cost: SaveCost, losses_per_hour: float, workers: int = 1, bounds: Bounds = USUAL) -> float:
    """Seconds of training between two checkpoints, within bounds.

    Args:
        cost: Of one checkpoint.
        losses_per_hour: Of one worker; see `loss_rate`.
        workers: Of this training: the loss of any stops all.
        bounds: The stall's is the strongest, then the longest, then the shortest.
    """
    rate = losses_per_hour * workers
    best = best_interval(cost.stall, HOUR / rate if rate > 0 else math.inf)
    within = min(max(best, bounds.shortest), bounds.longest)
    # A share of stalls s is d / (t + d). And the next one is not begun before the last one is safe.
    return max(within, cost.stall * (1 / bounds.stall - 1), cost.latency or 0.0)


def interval_steps(seconds: float, step_seconds: float, steps: int) -> int:
    """The same in whole steps of a training of `steps` steps: at least 1, and at most all of them."""
    return steps if seconds >= steps * step_seconds else max(1, round(seconds / step_seconds))


def expected_stretch(interval_seconds: float, stall: float, mean_time: float, restart: float = 0.0) -> float:
    """Wall-clock time over the time of an undisturbed training without checkpoints, losses being memoryless.

    Daly's complete model (equation 20 of the same article), per second of work.

    Args:
        interval_seconds: Training between two checkpoints.
        stall: Seconds that one costs.
        mean_time: Seconds between two losses.
        restart: Seconds from a loss until training goes on.
    """
    if math.isinf(mean_time):
        return (interval_seconds + stall) / interval_seconds
    exponent = (interval_seconds + stall) / mean_time
    if exponent + restart / mean_time > 600:   # beyond what a float holds: such a training never ends
        return math.inf
    return mean_time / interval_seconds * math.exp(restart / mean_time) * math.expm1(exponent)
