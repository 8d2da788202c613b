"""Memory of one worker of a stage next to that of its pool."""

from __future__ import annotations

from pydantic import BaseModel

from moedisco_ray.core.config import PoolName
from moedisco_ray.core.errors import PoolError
from moedisco_ray.plan.memory import GIB, Memory
from moedisco_ray.plan.remedy import Remedy


class WorkerPlan(BaseModel, frozen=True):
    """Memory of one worker of a stage, and whether it fits the stage's pool."""

    stage: str
    pool: PoolName
    memory: Memory
    """Peak memory of one worker."""
    pool_gb: float
    """Memory of one worker of the pool (GB); in a mixed pool, that of the largest node type."""
    fits: bool
    """Whether `memory`, an upper bound, is at most `pool_gb`."""
    fits_known: bool
    """Whether `fits` is reliable; false without GPUs, because CPU workers share the host's memory with other
    processes."""
    remedy: Remedy | None
    """Settings to change if the stage does not fit; null if it fits."""

    @property
    def problem(self) -> PoolError:
        """The error of a stage that does not fit its pool."""
        remedy = f"; {self.remedy}" if self.remedy is not None else ""
        return PoolError(
            f"pools.{self.pool}.memory_gb",
            self.pool_gb,
            f"a worker of {self.stage} needs {self.memory.total / GIB:.1f} GB{remedy}",
        )


class InferencePlan(WorkerPlan, frozen=True):
    """The plan of a stage that runs a model without training it; activations are the hidden states of the text."""
