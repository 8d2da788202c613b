"""How fast one worker of a pool is, and how that is known.

A pool of GPUs: assumed, 312 TFLOP/s in bf16 (data sheet of the A100-80GB) x 35 % utilisation x the pool's `speed`. A pool of
this machine's CPU cores: measured here by a probe of about two seconds (`moedisco_ray.execution.probe`). Anything else is unknown,
and what depends on it is unknown too.
"""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict

from moedisco_ray.core.config import Pool
from moedisco_ray.plan.cost import PEAK_FLOPS, UTILISATION

START_UP = 60.0
"""Time assumed for a process to start where it was not measured, such as a worker on a GPU that loads its model (s)."""


class Trial(BaseModel):
    """One measured training step of the probe."""

    model_config = ConfigDict(frozen=True)

    experts: int
    """Experts per layer; 1 is a dense model."""
    flops_per_token: float
    flops_per_second: float
    """By CPU time, on one core."""


class Probe(BaseModel):
    """What a probe measured of this machine."""

    model_config = ConfigDict(frozen=True)

    cores: int
    versions: dict[str, str]
    """Of what the measurement depends on."""
    trials: tuple[Trial, ...]
    start_up_seconds: float
    """CPU seconds from a process' start until its libraries are imported."""
    text_bytes_per_second: float
    """Bytes of text that one core makes tokens of."""

    def rate(self, flops_per_token: float, experts: int) -> float:
        """FLOP/s of one core: between two measured sizes linear in their logarithms, beyond them that of the nearest.

        Args:
            flops_per_token: Operations of a training step per token.
            experts: Experts per layer.
        """
        dense = experts == 1
        known = sorted((trial for trial in self.trials if (trial.experts == 1) is dense), key=lambda trial: trial.flops_per_token)
        below = [trial for trial in known if trial.flops_per_token <= flops_per_token]
        above = [trial for trial in known if trial.flops_per_token > flops_per_token]
        if not below or not above:
            return (below[-1] if below else above[0]).flops_per_second
        low, high = below[-1], above[0]
        part = math.log(flops_per_token / low.flops_per_token) / math.log(high.flops_per_token / low.flops_per_token)
        return math.exp((1 - part) * math.log(low.flops_per_second) + part * math.log(high.flops_per_second))


class Machine(BaseModel):
    """What is known of the machine that a run would use."""

    model_config = ConfigDict(frozen=True)

    probe: Probe | None = None
    """Of this machine, where pools without GPUs are its cores; null: their speed is unknown."""
    text_bytes: int | None = None
    """Bytes of the corpus' sources; null: unknown."""


class Speed(BaseModel):
    """The speed of a pool's workers."""

    model_config = ConfigDict(frozen=True)

    pool: str
    known: bool
    source: str
    """How it is known, in words."""


UNKNOWN_MACHINE = Machine()


def speed_of(pool: Pool, machine: Machine) -> Speed:
    """How the speed of a pool's workers is known."""
    if pool.gpu:
        return Speed(pool=pool.key, known=True, source=(
            f"assumed: {PEAK_FLOPS / 1e12:.0f} TFLOP/s (A100 data sheet) x {UTILISATION:.0%} x {pool.speed:g}, "
            f"{START_UP:.0f} s per start"))
    if machine.probe is None:
        return Speed(pool=pool.key, known=False, source="unknown: CPU workers that were not measured")
    return Speed(pool=pool.key, known=True, source=f"measured here, {machine.probe.cores} cores")


def seconds_for(pool: Pool, machine: Machine, flops: float, flops_per_token: float, experts: int) -> float | None:
    """Seconds of one worker for some operations; None: unknown.

    Args:
        pool: Of the worker.
        machine: What is known of it.
        flops: Operations to do.
        flops_per_token: Operations of one training step of that model per token: small models are slow for their size.
        experts: Experts per layer of the model.
    """
    if pool.gpu:
        return flops / (PEAK_FLOPS * UTILISATION * pool.speed)
    return None if machine.probe is None else flops / machine.probe.rate(flops_per_token, experts)


def start_up(pool: Pool | None, machine: Machine) -> float | None:
    """Seconds until a worker process works; None: unknown.

    Args:
        pool: Of the worker; None: a process on the head.
        machine: What is known of it.
    """
    if pool is not None and not pool.gpu and machine.probe is None:
        return None
    if (pool is not None and pool.gpu) or machine.probe is None:
        return START_UP
    return machine.probe.start_up_seconds
