"""Bytes that each worker of a sharded training sends in one step, and the layout of the workers that a plan assumes.

With w bytes per element in matrix products, gradients reduced in fp32, and M micro-batches per step:

* weights sharded among s workers: each gathers them once per step, or twice for every micro-batch, and reduces their
  gradients once per step, or, where that does not fit, for every micro-batch; embedding, norm and head stay gathered
  between forward and backward pass. Each gather sends (s - 1) / s of w bytes per parameter, and each reduction (s - 1)
  / s of 4;
* replicas: each reduction of a shard's gradients sends 2 (r - 1) / r of 4 bytes per parameter of the shard;
* experts divided among e workers (`finetune.parallel.expert`): their weights stay where they are, and are sharded among
  the other workers of the replica. In each MoE layer a token's k copies travel to their experts and back, and their
  gradients likewise: 4 k D w bytes per token, 6 with gradient checkpointing; (e - 1) / e of them leave the worker.

Sums over a few numbers, and what Muon exchanges, are left out: 8 (s - 1) / s^2 bytes per parameter of shared matrices.

Workers are numbered node by node. An exchange whose workers are all on one node takes place over the links between its
cards, any other over the network (`pools.*.network`), which all exchanges of a node share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from pydantic import BaseModel

from moedisco_ray.core.config import AnyPool, Architecture, Optimizer, Pool, RunConfig
from moedisco_ray.core.families import DECLARATIONS, FamilyName
from moedisco_ray.plan.memory import Exchange, compute_bytes, micro_batch_sequences, worker_sequences
from moedisco_ray.plan.parameters import Parameters, count_parameters
from moedisco_ray.policies.parallel import Layout, Sharing

_GRADIENT_BYTES = 4


class GangTraffic(BaseModel, frozen=True, defer_build=True):
    """Bytes that each worker of a gang sends in one step."""

    bytes: int
    """Bytes with the configured layout."""
    sharded: int
    """Bytes if all weights are sharded among all workers (FSDP alone)."""
    divided: int
    """Bytes if experts are divided among all workers, as far as their number allows."""
    expert: int
    """Number of workers among which `divided` divides experts; the value of `finetune.parallel.expert`."""
    seconds: float
    """Time of the exchange of one step with the configured layout (s)."""


@dataclasses.dataclass(frozen=True)
class Exchanged:
    """Bytes that each worker of a gang sends in one step within groups of workers.

    Attributes:
        bytes: Bytes that a worker sends.
        size: Number of workers in a group.
        stride: Distance between neighbours of a group, in the order of workers, and number of interleaved groups.
        everyone: Whether each worker sends to every other of its group, as tokens travel to experts; otherwise each
            sends to the next one, in a ring.
    """

    bytes: float
    size: int
    stride: int = 1
    everyone: bool = False

    def seconds(self, pool: Pool) -> float:
        """Time of the exchange on a pool's nodes."""
        node = pool.gpus_per_node
        if self.size * self.stride <= node:
            return self.bytes / pool.link_bytes_per_second
        at_once = node if self.everyone else min(node, self.stride)
        return self.bytes / min(pool.link_bytes_per_second, pool.network_bytes_per_second / at_once)


def planned_layout(
    config: RunConfig, pool: Pool, optimizer: Optimizer, workers: int, fits: Callable[[int], bool]
) -> Layout:
    """The layout of a gang on full nodes of a pool, as the gang itself chooses it.

    Args:
        config: The run's configuration.
        pool: The gang's pool.
        optimizer: Settings of the fine-tune's optimizer; Muon needs whole experts.
        workers: Number of workers.
        fits: Whether the memory of a number of workers is enough for one replica.
    """
    parallel, per_node = config.finetune.parallel, pool.gpus_per_node
    if workers % per_node:
        per_node = workers if workers < per_node else 1  # nodes with different numbers of workers
    several = parallel.replicate is None and 1 < per_node < workers
    return Sharing(
        config.model.architecture.num_experts,
        parallel.expert,
        parallel.replicate,
        fewest_shards=1 if not several or fits(per_node) else workers,
        whole_experts=optimizer.name == "muon",
    ).layout(workers, per_node)


def gang_traffic(
    family: FamilyName,
    architecture: Architecture,
    vocab_size: int,
    optimizer: Optimizer,
    *,
    sequence_length: int,
    pool: Pool,
    layout: Layout,
    exchange: Exchange,
) -> GangTraffic:
    """Bytes that each worker sends in one step, with a layout and with the two others to compare it with."""
    workers = layout.replicate * layout.shards
    parameters = count_parameters(family, architecture, vocab_size)
    expert = max(n for n in range(1, workers + 1) if workers % n == 0 and architecture.num_experts % n == 0)
    configured, sharded, divided = (
        step_exchanges(
            family,
            architecture,
            parameters,
            optimizer,
            sequence_length=sequence_length,
            gpu=pool.gpu,
            layout=each,
            exchange=exchange,
        )
        for each in (layout, Layout(data=workers), Layout(data=workers // expert, expert=expert))
    )
    return GangTraffic(
        bytes=total_bytes(configured),
        sharded=total_bytes(sharded),
        divided=total_bytes(divided),
        expert=expert,
        seconds=sum(each.seconds(pool) for each in configured),
    )


def total_bytes(exchanges: Sequence[Exchanged]) -> int:
    """Bytes that each worker sends in all exchanges of a step."""
    return round(sum(each.bytes for each in exchanges))


def step_exchanges(
    family: FamilyName,
    architecture: Architecture,
    parameters: Parameters,
    optimizer: Optimizer,
    *,
    sequence_length: int,
    gpu: int,
    layout: Layout,
    exchange: Exchange,
) -> tuple[Exchanged, ...]:
    """The exchanges of one step, by the formula in the docstring of this module."""
    workers = layout.replicate * layout.shards
    width, sequences = compute_bytes(optimizer, gpu), worker_sequences(optimizer, sequence_length, workers)
    passes = 1 if exchange == "step" else -(-sequences // micro_batch_sequences(optimizer, sequence_length, workers))
    gathers = 1 if exchange == "step" else 2 * passes
    experts = parameters.experts if layout.expert > 1 else 0
    kept = parameters.embedding + parameters.head + architecture.hidden_size  # the root module of FSDP
    reduced, shards, replicas = _GRADIENT_BYTES * passes, layout.shards, layout.replicate
    gathered = kept * width * passes + (parameters.total - kept - experts) * width * gathers
    whole = parameters.total - experts  # parameters that all workers of a replica share
    own = experts / layout.expert  # parameters of a worker's experts
    selected = sequences * sequence_length * architecture.num_experts_per_tok * architecture.hidden_size
    layers = architecture.num_hidden_layers - DECLARATIONS[family].dense_layers(architecture.fields)
    travels = 6 if optimizer.gradient_checkpointing else 4
    return (
        Exchanged((1 - 1 / shards) * (gathered + whole * reduced), shards),
        Exchanged((1 - 1 / layout.data) * own * (width * gathers + reduced), layout.data, stride=layout.expert),
        Exchanged(2 * (1 - 1 / replicas) * reduced * (whole / shards + own / layout.data), replicas, stride=shards),
        Exchanged(travels * layers * selected * width * (1 - 1 / layout.expert), layout.expert, everyone=True),
    )


def with_exchange(flops: float, traffic: GangTraffic | None, pool: AnyPool, experts: int, batch_tokens: int) -> float:
    """Operations per token, raised to those of the time that a step's exchange of data takes if that is longer."""
    if traffic is None or not pool.gpu:
        return flops
    return max(flops, traffic.seconds * pool.fewest_workers * pool.flops(experts) / batch_tokens)
