"""The pools of workers on which a run's work runs, and their prices."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from moedisco_ray.core.config.base import Section
from moedisco_ray.core.config.effects import Resolved
from moedisco_ray.core.config.places import WritesTo, check_storage
from moedisco_ray.core.config.pool import MOST_WORKERS, MachineType, Pool, PoolName, PricePerHour, Tag, Workers

OwnerName = Annotated[str, Field(max_length=32, pattern=r"^[A-Za-z0-9][\w-]{0,31}$")]


class LowMemoryPool(Pool):
    """The pool for the seed, for one-worker sub-models and, with `finetune.pool: low_memory`, for the whole MoE."""

    name = "low_memory"
    resource: Tag = "low_mem_gpu"
    memory_gb: float = Field(24, gt=0)
    price_per_hour: PricePerHour = 0.35
    speed: float = Field(0.72, gt=0)
    max_workers: int = Field(8, ge=1, le=MOST_WORKERS)
    """Maximum number of sub-models that train at once, and of workers that train the seed."""
    seed_workers: Workers | tuple[Workers, Workers] | Literal["auto"] = "auto"
    """Workers that train the seed together. Each holds the whole seed and takes a share of every batch, and they add up
    their gradients in every step: the result is that of one worker, up to rounding, in fewer hours. A number N means
    always N workers; repeated runs then have the same bits on CPUs, and with `deterministic` on GPUs. With [FEWEST,
    MOST], the seed starts with the workers that are free, shrinks when it loses one and grows when more arrive, in
    sizes that divide the batch; results are then the same up to rounding. `auto` is [1, N], with the largest N whose
    exchange, over `network` and between the `gpus_per_node` cards of a node, takes at most a quarter of the time to
    compute a step: 1 where batches are small for the model, or workers have no GPU. Of several node types, one worker
    trains the seed."""
    types: Annotated[tuple[MachineType, ...], Resolved("precision")] = Field((), max_length=32)
    """Node types of a mixed pool. A sub-model runs on the cheapest type that it fits. Each type has its own resource,
    memory, price and speed, which replace the pool's. An empty list means that all nodes are of one type."""

    @property
    def fewest_workers(self) -> int:
        """Minimum number of workers of a gang, which always takes the whole pool."""
        return self.max_workers

    @property
    def most_workers(self) -> int:
        """Maximum number of workers of a gang.

        A gang takes every worker of its pool, so this is the pool's maximum size.
        """
        return self.max_workers

    @property
    def workers_per_node(self) -> int:
        return min(self.gpus_per_node, self.max_workers)

    @property
    def fewest_for_seed(self) -> int:
        """Minimum number of workers with which the seed starts."""
        return 1 if self.seed_workers == "auto" else min(_bounds(self.seed_workers))

    def gang(self, fewest: int, most: int) -> LowMemoryPool:
        """The pool for a gang of between two numbers of its workers."""
        return _Gang(**self.model_dump(), bounds=(fewest, most))

    @property
    def node_types(self) -> tuple[LowMemoryPool, ...]:
        """One pool per node type; only the pool itself if it is not mixed."""
        return tuple(
            _OneType(
                gpu=self.gpu,
                memory=self.memory,
                network=self.network,
                gpus_per_node=self.gpus_per_node,
                host_memory_gb=self.host_memory_gb,
                type_name=each.name,
                **each.model_dump(exclude={"name"}),
            )
            for each in self.types
        ) or (self,)

    @property
    def mixed(self) -> bool:
        """Whether the pool has several node types."""
        return bool(self.types)

    @model_validator(mode="after")
    def _the_seed_has_slots(self) -> Self:
        if self.seed_workers == "auto":
            return self
        fewest, most = _bounds(self.seed_workers)
        shown = self.seed_workers if isinstance(self.seed_workers, int) else list(self.seed_workers)
        if not fewest <= most <= self.max_workers:
            raise ValueError(
                f"seed_workers {shown} must be a number, or the fewest first and then the most, up to max_workers "
                f"{self.max_workers}"
            )
        if most > 1 and self.types:
            raise ValueError(f"seed_workers {shown} must be of one node type; remove types, or set it to 1")
        return self

    @model_validator(mode="after")
    def _types_differ(self) -> Self:
        for setting in ("name", "resource"):
            values = [getattr(each, setting) for each in self.types]
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise ValueError(f"two types have the {setting} {twice!r}; each needs its own")
        return self


def _bounds(workers: int | tuple[int, int]) -> tuple[int, int]:
    return (workers, workers) if isinstance(workers, int) else workers


class _Gang(LowMemoryPool):
    """The pool for a gang that takes some of its workers."""

    bounds: tuple[int, int]

    @property
    def fewest_workers(self) -> int:
        return self.bounds[0]

    @property
    def most_workers(self) -> int:
        return self.bounds[1]


class _OneType(LowMemoryPool):
    """A pool that stands for one node type of a mixed pool."""

    type_name: str

    @property
    def key(self) -> str:
        return f"{self.name}.{self.type_name}"


class Owner(Section):
    """The storage and the seats of a data owner.

    The owner's text is read, tokenised and trained on by its own seats, and text, tokens, checkpoints and logs stay in
    its own storage. Only weights and figures come to the run. Its seats are otherwise as those of `low_memory`.
    """

    storage: Annotated[str, WritesTo("checkpoints"), AfterValidator(check_storage)]
    """A folder that all of the owner's nodes share, or a URI (`s3://BUCKET/FOLDER`). The run uses STORAGE/NAME-ID. Only
    the owner's nodes need access."""
    resource: Tag
    """Custom resource of the owner's nodes, which no other pool or owner has."""
    price_per_hour: PricePerHour | None = None
    """Dollars per worker-hour of the owner's nodes, 0 if the run does not pay for them; null: the price of
    `low_memory`."""


class OwnerPool(LowMemoryPool):
    """The pool of a data owner's seats."""

    owner_name: str

    @property
    def key(self) -> str:
        """Name of the owner's seats in the bill."""
        return f"owners.{self.owner_name}"

    @property
    def owner(self) -> str:
        """The data owner to whom the pool belongs."""
        return self.owner_name

    @property
    def path(self) -> str:
        """Dotted path of the owner's settings."""
        return f"pools.owners.{self.owner_name}"


class _Joint(LowMemoryPool):
    """The low-memory pool together with the seats of data owners."""

    parts: tuple[LowMemoryPool, ...]

    @property
    def node_types(self) -> tuple[LowMemoryPool, ...]:
        return tuple(node_type for part in self.parts for node_type in part.node_types)

    @property
    def mixed(self) -> bool:
        return self.parts[0].mixed


class HighMemoryPool(Pool):
    """The pool that trains the merged MoE with a gang of workers."""

    name = "high_memory"
    resource: Tag = "high_mem_gpu"
    memory_gb: float = Field(80, gt=0)
    price_per_hour: PricePerHour = 2.28
    speed: float = Field(1.0, gt=0)
    workers: Workers | tuple[Workers, Workers] = 1
    """Size of the gang. A number N means always N workers; repeated runs then have the same bits on CPUs, and with
    `deterministic` on GPUs. With [FEWEST, MOST], the gang starts with the workers that are free, shrinks when it loses
    a worker and grows when more arrive, in sizes that divide the batch; results are then the same up to rounding."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.fewest_workers > self.most_workers:
            raise ValueError(
                f"workers [{self.fewest_workers}, {self.most_workers}] must name the fewest first, then the most"
            )
        return self

    @property
    def fewest_workers(self) -> int:
        """Minimum number of workers of the gang."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """Maximum number of workers of the gang."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def workers_per_node(self) -> int:
        return min(self.gpus_per_node, self.most_workers)

    @property
    def elastic(self) -> bool:
        """Whether the gang may change its size."""
        return self.fewest_workers < self.most_workers


AnyPool = LowMemoryPool | HighMemoryPool


class Pools(Section):
    """The pools of workers."""

    low_memory: LowMemoryPool = LowMemoryPool()
    high_memory: HighMemoryPool = HighMemoryPool()
    owners: dict[OwnerName, Owner] = Field(default_factory=dict, max_length=256)
    """Data owners by name. A source with an `owner` stays with that owner, whose text is one cluster of its own."""

    @property
    def by_key(self) -> dict[str, Pool]:
        """All pools by their name in the bill: low-memory node types, owners' pools, and the high-memory pool."""
        return {each.key: each for pool in (self.submodels, self.high_memory) for each in pool.node_types}

    @property
    def submodels(self) -> LowMemoryPool:
        """The pools on which sub-models train: the low-memory pool and the data owners' pools."""
        if not self.owners:
            return self.low_memory
        parts = (self.low_memory, *self.of_owners)
        shared = self.low_memory.model_dump(exclude={"max_workers"})
        return _Joint(**shared, max_workers=min(MOST_WORKERS, sum(part.max_workers for part in parts)), parts=parts)

    @property
    def of_owners(self) -> tuple[OwnerPool, ...]:
        """The pool of each data owner's seats."""
        shared = self.low_memory.model_dump(exclude={"resource", "types"})
        own = {"resource", "price_per_hour"}
        return tuple(
            OwnerPool(**(shared | owner.model_dump(include=own, exclude_none=True)), owner_name=name)
            for name, owner in self.owners.items()
        )

    def needed(self, finetune: PoolName, *, seed: bool) -> tuple[tuple[AnyPool, int], ...]:
        """The pools that a run uses, each with the number of workers that it needs at the same time.

        Args:
            finetune: The pool that fine-tunes; if it is the low-memory one, the run does not need the other.
            seed: Whether a seed trains.
        """
        owned = tuple((pool, 1) for pool in self.of_owners)
        if finetune == "low_memory":
            return (self.low_memory, self.low_memory.fewest_workers), *owned
        low = (self.low_memory, self.low_memory.fewest_for_seed if seed else 1)
        return low, (self.high_memory, self.high_memory.fewest_workers), *owned

    def at(self, key: str) -> Pool:
        """The pool or node type with this name in the bill; a node type that was removed from its pool gives the pool.

        Raises:
            KeyError: No pool has this name.
        """
        pools: dict[str, Pool] = {
            "low_memory": self.low_memory,
            "high_memory": self.high_memory,
            "owners": self.low_memory,
        }
        return self.by_key.get(key) or pools[key.partition(".")[0]]
