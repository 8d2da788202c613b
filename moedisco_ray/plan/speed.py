"""Speed of a pool's workers, and its source.

The speed of a GPU is its card's peak x the share of it that published trainings reach (`moedisco_ray.core.cards`). If
the pool names no card, it is 312 TFLOP/s in bf16 (data sheet of the A100-80GB) x 35 % x the pool's `speed`. Another run
(`moedisco_ray.plan.measured_speed`) or `moedisco doctor` (`moedisco_ray.plan.measured_machines`) may have measured it.
The speed of this machine's CPU cores is measured by a probe of about two seconds (`moedisco_ray.execution.probe`). The
speed of other workers is unknown, and so are the figures that depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from pydantic import BaseModel

from moedisco_ray.core.cards import PEAK_FLOPS, UTILISATION, Card
from moedisco_ray.core.config import Pool

START_UP = 60.0
"""Start-up time in seconds that is assumed for workers without a measurement, such as GPU workers."""

STORE_BYTES_PER_SECOND = 125e6
"""Highest speed at which one worker is assumed to write to storage and to read from it (bytes/s): 1 Gbit/s."""


class Trial(BaseModel, frozen=True, defer_build=True):
    """One measured training step of the probe."""

    experts: int
    """Experts per layer; 1 is a dense model."""
    flops_per_token: float
    flops_per_second: float
    """FLOP per second of one core's CPU time."""


class Probe(BaseModel, frozen=True, defer_build=True):
    """Measurements of this machine."""

    cores: int
    versions: dict[str, str]
    """Versions of the packages that the measurement depends on."""
    trials: tuple[Trial, ...]
    start_up_seconds: float
    """CPU time in seconds from the start of a process until its libraries are imported."""
    text_bytes_per_second: float
    """Bytes of text that one core tokenizes per second."""

    def rate(self, flops_per_token: float, experts: int) -> float:
        """FLOP/s of one core, interpolated on logarithmic scales between measured model sizes; constant beyond them.

        Args:
            flops_per_token: Operations of a training step per token.
            experts: Experts per layer.
        """
        dense = experts == 1
        known = sorted(
            (trial for trial in self.trials if (trial.experts == 1) is dense), key=lambda trial: trial.flops_per_token
        )
        below = [trial for trial in known if trial.flops_per_token <= flops_per_token]
        above = [trial for trial in known if trial.flops_per_token > flops_per_token]
        if not below or not above:
            return (below[-1] if below else above[0]).flops_per_second
        low, high = below[-1], above[0]
        part = math.log(flops_per_token / low.flops_per_token) / math.log(high.flops_per_token / low.flops_per_token)
        return math.exp((1 - part) * math.log(low.flops_per_second) + part * math.log(high.flops_per_second))


class Machine(BaseModel, frozen=True, defer_build=True):
    """Known facts about the machine that a run would use."""

    probe: Probe | None = None
    """Probe of this machine if pools without GPUs use its cores. Null means that the speed of workers without GPUs is
    unknown."""
    text_bytes: int | None = None
    """Size of the corpus' sources (bytes); null if unknown."""
    measured: Mapping[str, str] = {}
    """How the speed of a pool's GPUs was measured, in words, such as `in runs/mine`, by pool."""


class Speed(BaseModel, frozen=True, defer_build=True):
    """The speed of a pool's workers."""

    pool: str
    known: bool
    source: str
    """Where the speed comes from, in words."""


UNKNOWN_MACHINE = Machine()


def speed_of(pool: Pool, machine: Machine) -> Speed:
    """The speed of a pool's workers, and its source."""
    if pool.gpu and pool.key in machine.measured:
        dense, moe = (f"{pool.flops(experts) / 1e12:.3g}" for experts in (1, 2))
        several = "" if moe == dense else f", {moe} with several experts per layer"
        return Speed(
            pool=pool.key,
            known=True,
            source=f"measured {machine.measured[pool.key]}: {dense} TFLOP/s per worker{several}",
        )
    if pool.gpu_card is not None:
        return Speed(pool=pool.key, known=True, source=_of_card(pool, pool.gpu_card))
    if pool.gpu:
        return Speed(
            pool=pool.key,
            known=True,
            source=(
                f"assumed: {PEAK_FLOPS / 1e12:.0f} TFLOP/s (A100 data sheet) x {UTILISATION:.0%} x {pool.speed:g}, "
                f"{START_UP:.0f} s per start"
            ),
        )
    if machine.probe is None:
        return Speed(pool=pool.key, known=False, source="unknown: CPU workers that were not measured")
    return Speed(pool=pool.key, known=True, source=f"measured here, {machine.probe.cores} cores")


def _of_card(pool: Pool, card: Card) -> str:
    """The card's speed in words, and whether a publication measured each share of its peak."""
    mfu, known = card.mfu, {True: "published", False: "assumed"}
    peak = f"{card.tflops:g} TFLOP/s" if card.bf16 else f"{card.tflops_fp32:g} TFLOP/s in fp32, as it has no bf16"
    stated = pool.speed * PEAK_FLOPS * UTILISATION / card.flops(moe=False)
    factor = "" if math.isclose(stated, 1, rel_tol=1e-6) else f", x {stated:.3g} (pools.{pool.name}.speed)"
    dense, moe = known[mfu.dense_source is not None], known[mfu.moe_source is not None]
    return (
        f"{card.name}, {peak} x {mfu.dense:.0%} for dense models ({dense}), {mfu.moe:.0%} for several experts per "
        f"layer ({moe}){factor}; {START_UP:.0f} s per start"
    )


def store_bytes_per_second(pool: Pool) -> float:
    """Speed at which each of a pool's workers writes to storage and reads from it, while all of its node do."""
    return min(STORE_BYTES_PER_SECOND, pool.network_bytes_per_second / pool.gpus_per_node)


def seconds_for(pool: Pool, machine: Machine, flops: float, flops_per_token: float, experts: int) -> float | None:
    """Seconds that one worker needs for a number of operations; None if its speed is unknown.

    Args:
        pool: Pool of the worker.
        machine: The machine.
        flops: Number of operations.
        flops_per_token: Operations per token of a training step; small models reach a lower rate.
        experts: Experts per layer of the model.
    """
    if pool.gpu:
        return flops / pool.flops(experts)
    return None if machine.probe is None else flops / machine.probe.rate(flops_per_token, experts)


def start_up(pool: Pool | None, machine: Machine) -> float | None:
    """Start-up time of a worker process in seconds; None if unknown.

    Args:
        pool: Pool of the worker; None for a process on the head.
        machine: The machine.
    """
    if pool is not None and not pool.gpu and machine.probe is None:
        return None
    if (pool is not None and pool.gpu) or machine.probe is None:
        return START_UP
    return machine.probe.start_up_seconds
