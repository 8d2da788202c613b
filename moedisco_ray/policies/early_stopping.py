"""Whether a training still buys enough: it ends when its loss falls by less per step than is asked."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean


def window_of(steps: int) -> int:
    """Steps over which a gain is looked at, for a training of `steps` steps: a fifth, at least 32."""
    return max(32, steps // 5)


def gain_per_step(losses: Sequence[float]) -> float:
    """By how much a loss falls per step: the mean of the older half less that of the newer, over half their number."""
    half = len(losses) // 2
    return (fmean(losses[:half]) - fmean(losses[-half:])) / (len(losses) - half)


def is_spent(losses: Sequence[float], least_gain: float, window: int) -> bool:
    """Whether a training should end.

    Args:
        losses: Of its steps so far, or of those that count.
        least_gain: Nats per step that are asked for.
        window: Steps to look at; with fewer losses nothing is said.
    """
    return len(losses) >= window and gain_per_step(losses[-window:]) < least_gain
