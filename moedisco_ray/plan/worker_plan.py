"""Memory of one worker of a stage next to that of its pool."""

from __future__ import annotations

from pydantic import BaseModel

from moedisco_ray.core.config import PoolName
from moedisco_ray.core.errors import PoolError
from moedisco_ray.plan.memory import GIB, Memory
from moedisco_ray.plan.remedy import Remedy


class WorkerPlan(BaseModel, frozen=True, defer_build=True):
    """Memory of one worker of a stage, and whether it fits the stage's pool."""

    stage: str
    pool: PoolName
    memory: Memory
    """Peak memory of one worker."""
    pool_gb: float
    """Memory of one worker of the pool (GiB); in a mixed pool, that of the largest node type."""
    host_memory_gb: float | None = None
    """Main memory of a node of the pool (GiB); null if it is unknown."""
    host_gb: float | None = None
    """Part of it that one worker may fill (GiB); null if it is unknown."""
    fits: bool
    """Whether `memory`, an upper bound, is at most `pool_gb`, and what it holds on the host at most `host_gb`."""
    fits_known: bool
    """Whether `fits` is reliable; false without GPUs, because CPU workers share the host's memory with other
    processes."""
    remedy: Remedy | None
    """Settings to change if the stage does not fit; null if it fits."""

    @property
    def excess(self) -> float:
        """Memory that the stage needs, as a multiple of what there is; above 1, it does not fit."""
        return self.memory.excess(self.pool_gb, self.host_gb)

    @property
    def shortage(self) -> str:
        """What a stage that does not fit lacks, in words."""
        if self.memory.total > self.pool_gb * GIB:
            return f"{self.stage} needs {self.memory.total / GIB:.1f} of {self.pool_gb:g} GiB per card"
        memory, room = self.memory, f"and its machine has room for {self.host_gb or 0:.1f} GiB each"
        if not (memory.host or memory.offloaded):
            return f"{self.stage} needs {memory.synced / GIB:.1f} GiB of main memory per card for syncs, {room}"
        does = "streams from" if memory.host else "offloads"
        syncs = f", {memory.synced / GIB:.1f} GiB of it for syncs" if memory.synced else ""
        return f"{self.stage} {does} {memory.on_host / GIB:.1f} GiB per card{syncs}, {room}"

    @property
    def problem(self) -> PoolError:
        """The error of a stage that does not fit its pool."""
        remedy = f"; {self.remedy}" if self.remedy is not None else ""
        if self.memory.total <= self.pool_gb * GIB:
            return PoolError(f"pools.{self.pool}.host_memory_gb", self.host_memory_gb, f"{self.shortage}{remedy}")
        return PoolError(
            f"pools.{self.pool}.memory_gb",
            self.pool_gb,
            f"a worker of {self.stage} needs {self.memory.total / GIB:.1f} GiB{remedy}",
        )


class InferencePlan(WorkerPlan, frozen=True):
    """The plan of a stage that runs a model without training it; activations are the hidden states of the text."""
