"""A pool of workers: their resource, card, memory, price, speed and network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, PrivateAttr, model_validator

from moedisco_ray.core.cards import PEAK_FLOPS, UTILISATION, Card, find_card, known_card
from moedisco_ray.core.config.base import Section
from moedisco_ray.core.config.effects import Resolved
from moedisco_ray.core.limits import USABLE_MEMORY, WORKER_PROCESS_GB

PoolName = Literal["low_memory", "high_memory"]
Residence = Literal["resident", "streamed"]
"""Where the weights and the optimizer state of a training are; see `Pool.memory`."""
MOST_WORKERS = 65_536
Workers = Annotated[int, Field(ge=1, le=MOST_WORKERS)]

_RAYS_OWN = frozenset(
    {
        "CPU",
        "GPU",
        "memory",
        "object_store_memory",
        "TPU",
        "HPU",
        "NPU",
        "TTNPU",
        "neuron_cores",
        "FURIOSA",
        "MBLT",
        "RBLN",
    }
)
"""Resources that Ray itself counts on every node, or on every node with that accelerator."""
_PLACEMENT_GROUP = re.compile(r"(^bundle_group_|_group_(\d+_)?[0-9a-f]{16,})")
"""Pattern of the resources that Ray itself adds to a node for a placement group."""


def _is_a_tag(resource: str) -> str:
    if resource in _RAYS_OWN or _PLACEMENT_GROUP.search(resource):
        raise ValueError(
            f"{resource} is one of Ray's own resources; name a custom resource that only the nodes of this pool offer"
        )
    return resource


Tag = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$"), AfterValidator(_is_a_tag)]
"""A custom resource that the nodes of a pool offer. Ray's own resources are rejected, because every node offers
them."""
Gpus = Annotated[int, Field(ge=0, le=1), Resolved("precision")]
PricePerHour = Annotated[float, Field(ge=0, allow_inf_nan=False)]
CardName = Annotated[str, Field(max_length=64), AfterValidator(known_card)]
Network = Annotated[float, Field(gt=0, allow_inf_nan=False)]

UNKNOWN_LINK = 12e9
"""Assumed speed between cards of a node that are not named (bytes/s, each way): half of PCIe 4.0 with 16 lanes."""
_GIGABIT = 1e9 / 8
"""Bytes per second of 1 Gbit/s."""


class Slots(Section):
    """What one worker gets on the nodes of a pool, or on those of one node type."""

    resource: Tag
    """Custom resource that only these nodes offer: each offers an amount of 1 for each worker that it has room for."""
    card: Annotated[CardName | None, Resolved("precision")] = None
    """The GPU, such as `L4`, `RTX 4090`, `A100-80GB` or `H100` (`moedisco_ray.core.cards` lists them). Memory, speed,
    and the precision that `auto` means follow from it. Null: an unknown GPU with the stated memory and speed."""
    memory_gb: float = Field(gt=0)
    """Memory of a worker (GiB). If it is left out and `card` is set, that of the card."""
    price_per_hour: PricePerHour
    """Dollars per worker-hour."""
    speed: float = Field(gt=0)
    """Training speed relative to one A100-80GB at 35 % of its peak. If it is left out and `card` is set, that of the
    card."""

    @model_validator(mode="before")
    @classmethod
    def _follows_from_card(cls, raw: Any) -> Any:
        """Add the memory and the speed of a card to settings that name it and do not state them."""
        if not isinstance(raw, Mapping):
            return raw
        name = raw.get("card")
        card = find_card(name) if isinstance(name, str) else None
        if card is None:
            return raw
        speed = card.flops(moe=False) / (PEAK_FLOPS * UTILISATION)
        follows = {"memory_gb": card.memory_gb, "speed": speed}
        return {**raw, **{key: value for key, value in follows.items() if raw.get(key) is None}}

    @model_validator(mode="after")
    def _card_has_the_memory(self) -> Self:
        known = None if self.card is None else find_card(self.card)
        if known is not None and self.memory_gb > known.memory_gb:
            raise ValueError(
                f"memory_gb {self.memory_gb:g} is more than a {known.name} has, {known.memory_gb:g}; lower it, or "
                "leave it out"
            )
        return self


class Pool(Slots):
    """A pool of workers."""

    name: ClassVar[PoolName]
    """Key of the pool in `pools`."""

    gpu: Gpus = 0
    """Number of GPUs per worker; with 0, workers train on a CPU."""
    memory: Residence = "resident"
    """Where trainings have their weights and optimizer state. `resident`: on the card. `streamed`: in the host's
    memory. One layer at a time then comes to the card, so the card needs room for two layers, whatever the size of the
    model, and the host for 6 bytes per parameter with Muon in `pure_bf16`, up to 16 with AdamW in fp32. All
    micro-batches of a step pass a layer before the next one comes: with tens of thousands of tokens per step the copies
    take no time, with fewer the card waits for them. The result is that of `resident`, bit for bit on a CPU. The whole
    MoE trains on all workers of the pool, which must be on one node: its cards divide the layers, and the result is the
    same up to rounding. Each other training has one worker."""
    gpus_per_node: int = Field(1, ge=1, le=MOST_WORKERS)
    """Number of workers on one node. They exchange data over the links between its cards, and others over the
    network."""
    network: Network = 10.0
    """Network of a node (Gbit/s, each way), which its workers share. Storage is assumed to give a worker 1 Gbit/s of it
    at most."""
    host_memory_gb: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    """Main memory of a node (GiB), which its workers share. Optimizer state that does not fit there is not offloaded.
    Null: unknown, and assumed to be enough for what is configured; `recipe` then chooses no streamed training."""

    _slots: int = PrivateAttr(1)

    @property
    def slots(self) -> int:
        """Number of slots of one node that one training holds."""
        return self._slots

    def holding(self, slots: int) -> Self:
        """The pool for a training that holds a number of slots of one node."""
        pool = self.model_copy()
        pool._slots = slots  # noqa: SLF001 - a copy of its own
        return pool

    @property
    def gpu_card(self) -> Card | None:
        """The pool's GPU; None if the configuration does not name it."""
        return find_card(self.card) if self.gpu and self.card is not None else None

    @property
    def cards_without_bf16(self) -> tuple[str, ...]:
        """The pool's cards that do not multiply matrices in bf16."""
        cards = (each.gpu_card for each in self.node_types)
        return tuple(card.name for card in cards if card is not None and not card.bf16)

    @property
    def bf16(self) -> bool:
        """Whether all cards of the pool multiply matrices in bf16; cards that are not named are assumed to."""
        return self.gpu > 0 and not self.cards_without_bf16

    def flops(self, experts: int) -> float:
        """Operations per second of one worker that trains a model.

        Args:
            experts: Experts per layer; several reach a smaller share of the peak than one.
        """
        card = self.gpu_card
        slower = 1.0 if card is None or experts == 1 else card.mfu.moe / card.mfu.dense
        return PEAK_FLOPS * UTILISATION * self.speed * slower

    @property
    def link_bytes_per_second(self) -> float:
        """Speed at which GPUs of one node exchange data (bytes/s, each way)."""
        card = self.gpu_card
        return UNKNOWN_LINK if card is None else card.link_gb_per_second * 1e9

    @property
    def network_bytes_per_second(self) -> float:
        """Speed of a node's network (bytes/s, each way)."""
        return self.network * _GIGABIT

    @property
    def workers_per_node(self) -> int:
        """Maximum number of workers on one node at a time."""
        return self.gpus_per_node

    @property
    def host_gb_per_worker(self) -> float | None:
        """Main memory that a worker may fill with data, besides its process (GiB); None if it is unknown."""
        return self.host_gb(1)

    def host_gb(self, slots: int) -> float | None:
        """Main memory that a training on some slots of a node may fill, besides its process (GiB); None: unknown."""
        if self.host_memory_gb is None:
            return None
        share = min(1.0, slots / self.workers_per_node)
        return max(0.0, self.host_memory_gb * USABLE_MEMORY * share - WORKER_PROCESS_GB)

    @property
    def key(self) -> str:
        """Name of the pool's workers in the bill."""
        return self.name

    @property
    def node_types(self) -> tuple[Pool, ...]:
        """One pool per node type; only the pool itself if it is not mixed."""
        return (self,)

    @property
    def mixed(self) -> bool:
        """Whether the pool has several node types."""
        return False

    @property
    def owner(self) -> str | None:
        """The data owner whose seats these are; None: seats for text without an owner."""
        return None

    @property
    def path(self) -> str:
        """Dotted path of the pool's settings."""
        return f"pools.{self.name}"

    @property
    def tags(self) -> tuple[str, ...]:
        """Custom resources of the node types."""
        return tuple(each.resource for each in self.node_types)


class MachineType(Slots):
    """A node type of a mixed pool."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w-]{0,31}$")
    """Name of the node type in the report and the bill."""
    max_workers: int = Field(8, ge=1, le=MOST_WORKERS)
    """Maximum number of sub-models that train on this node type at once."""
