"""The pools: where the work runs, and what it costs."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from moedisco_ray.core.config.base import Section
from moedisco_ray.core.config.effects import Resolved

PoolName = Literal["low_memory", "high_memory"]
MOST_WORKERS = 65_536
Workers = Annotated[int, Field(ge=1, le=MOST_WORKERS)]

_RAYS_OWN = frozenset({
    "CPU", "GPU", "memory", "object_store_memory", "TPU", "HPU", "NPU", "TTNPU", "neuron_cores", "FURIOSA", "MBLT", "RBLN"})
"""Resources that Ray counts by itself on every node, or on every node with such an accelerator."""
_PLACEMENT_GROUP = re.compile(r"(^bundle_group_|_group_(\d+_)?[0-9a-f]{16,})")
"""Names under which Ray keeps what a placement group has reserved."""


def _is_a_tag(resource: str) -> str:
    if resource in _RAYS_OWN or _PLACEMENT_GROUP.search(resource):
        raise ValueError(f"{resource} is a resource of Ray's own; name a custom resource that only this pool's nodes offer")
    return resource


Tag = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$"), AfterValidator(_is_a_tag)]
"""A custom resource that the nodes of a pool offer. Ray's own are refused: every node of the cluster offers them."""
Gpus = Annotated[int, Field(ge=0, le=1), Resolved("precision")]
PricePerHour = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Pool(Section):
    """Machines of one kind, as Ray sees them."""

    name: ClassVar[PoolName]
    """Its key in `pools`."""

    resource: Tag
    """The custom resource that a node of this pool offers: one per worker it has room for."""
    gpu: Gpus = 0
    """GPUs a worker holds; 0 trains on CPU."""
    memory_gb: float = Field(gt=0)
    price_per_hour: PricePerHour
    """Dollars per worker-hour."""
    speed: float = Field(gt=0)
    """Training speed relative to one A100-80GB."""

    @property
    def key(self) -> str:
        """What the meter calls its workers."""
        return self.name

    @property
    def node_types(self) -> tuple[Pool, ...]:
        """A pool for each of its node types; itself, where machines are all alike."""
        return (self,)

    @property
    def mixed(self) -> bool:
        """Whether it names node types, so that a trainer has to be told where it fits."""
        return False

    @property
    def tags(self) -> tuple[str, ...]:
        """The custom resources that its nodes offer, one of each node type."""
        return tuple(each.resource for each in self.node_types)


class MachineType(Section):
    """One node type of a mixed pool."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w-]{0,31}$")
    """What the report and the meter call it."""
    resource: Tag
    """The custom resource that its nodes offer, and those of no other type: Ray places by resources, not by labels."""
    memory_gb: float = Field(gt=0)
    price_per_hour: PricePerHour
    """Dollars per worker-hour."""
    speed: float = Field(gt=0)
    """Training speed relative to one A100-80GB."""
    max_workers: int = Field(8, ge=1, le=MOST_WORKERS)
    """Most sub-models that train on it at once."""


class LowMemoryPool(Pool):
    """Trains the seed model and the sub-models, one worker each; all at once, the whole MoE where `finetune.pool` says so."""

    name = "low_memory"
    resource: Tag = "low_mem_gpu"
    gpu: Gpus = 0
    memory_gb: float = Field(24, gt=0)
    price_per_hour: PricePerHour = 0.35
    speed: float = Field(0.72, gt=0)
    max_workers: int = Field(8, ge=1, le=MOST_WORKERS)
    """Most sub-models that train at once."""
    types: tuple[MachineType, ...] = Field((), max_length=32)
    """Node types of a mixed pool: a sub-model goes where it fits for the least money. Each has its own tag, memory, price and
    speed, in place of the pool's. Empty: the pool is of one type."""

    @property
    def fewest_workers(self) -> int:
        """A gang of this pool has all of its workers."""
        return self.max_workers

    @property
    def most_workers(self) -> int:
        """The same."""
        return self.max_workers

    @property
    def node_types(self) -> tuple[LowMemoryPool, ...]:
        """A pool for each of its node types; itself, where machines are all alike."""
        return tuple(
            _OneType(gpu=self.gpu, type_name=each.name, **each.model_dump(exclude={"name"})) for each in self.types) or (self,)

    @property
    def mixed(self) -> bool:
        """Whether it names node types, so that a trainer has to be told where it fits."""
        return bool(self.types)

    @model_validator(mode="after")
    def _types_differ(self) -> Self:
        for setting in ("name", "resource"):
            values = [getattr(each, setting) for each in self.types]
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise ValueError(f"two types have the {setting} {twice!r}; each needs its own")
        return self


class _OneType(LowMemoryPool):
    """A node type of a mixed pool, as a pool of its own."""

    type_name: str

    @property
    def key(self) -> str:
        """What the meter calls its workers."""
        return f"{self.name}.{self.type_name}"


class HighMemoryPool(Pool):
    """Trains the merged MoE with a gang of workers, all of them at once."""

    name = "high_memory"
    resource: Tag = "high_mem_gpu"
    gpu: Gpus = 0
    memory_gb: float = Field(80, gt=0)
    price_per_hour: PricePerHour = 2.28
    speed: float = Field(1.0, gt=0)
    workers: Workers | tuple[Workers, Workers] = 1
    """Size of the gang. N: all of them or none, and the same bits every time. [FEWEST, MOST]: begins with what there is,
    shrinks when a worker is lost and grows when more come, by sizes that divide the batch; the same up to rounding."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.fewest_workers > self.most_workers:
            raise ValueError(f"workers [{self.fewest_workers}, {self.most_workers}] must name the fewest first, then the most")
        return self

    @property
    def fewest_workers(self) -> int:
        """The gang never has less."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """The gang never has more."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def elastic(self) -> bool:
        """Whether the gang may have one size and then another."""
        return self.fewest_workers < self.most_workers


AnyPool = LowMemoryPool | HighMemoryPool


class Pools(Section):
    """Where the work runs."""

    low_memory: LowMemoryPool = LowMemoryPool()
    high_memory: HighMemoryPool = HighMemoryPool()

    @property
    def by_key(self) -> dict[str, Pool]:
        """Everything that workers can be held of, by what the meter calls it: a pool, or a node type of a mixed one."""
        return {each.key: each for pool in (self.low_memory, self.high_memory) for each in pool.node_types}

    def needed(self, finetune: PoolName) -> tuple[tuple[AnyPool, int], ...]:
        """The pools that a run works on, in that order, each with the workers that must exist at once.

        Args:
            finetune: The pool of its fine-tune; where that is the low-memory one, the run needs no other.
        """
        if finetune == "low_memory":
            return ((self.low_memory, self.low_memory.fewest_workers),)
        return (self.low_memory, 1), (self.high_memory, self.high_memory.fewest_workers)

    def at(self, key: str) -> Pool:
        """What the meter calls `key`; of a type that the configuration names no more, its pool.

        Raises:
            KeyError: There is no such pool.
        """
        pools: dict[str, Pool] = {pool.name: pool for pool in (self.low_memory, self.high_memory)}
        return self.by_key.get(key) or pools[key.partition(".")[0]]
