"""Bytes that each worker of a sharded training sends in one step, and the layout of the workers that a plan assumes.

With w bytes per element in matrix products, gradients reduced in fp32, and M micro-batches per step:

* weights sharded among s workers: each gathers them once per step, or twice for every micro-batch, and reduces their
  gradients once per step, or for every micro-batch (`finetune.exchange`); embedding, norm and head stay gathered
  between forward and backward pass. Each gather sends (s - 1) / s of w bytes per parameter, and each reduction (s - 1)
  / s of 4;
* replicas: each reduction of a shard's gradients sends 2 (r - 1) / r of 4 bytes per parameter of the shard;
* experts divided among e workers (`finetune.parallel.expert`): their weights stay where they are, and are sharded among
  the other workers of the replica. In each MoE layer a token's k copies travel to their experts and back, and their
  gradients likewise: 4 k D w bytes per token, 6 with gradient checkpointing; (e - 1) / e of them leave the worker.

Sums over a few numbers, and what Muon gathers, are left out.
"""

from __future__ import annotations

from pydantic import BaseModel

from moedisco_ray.core.config import AnyPool, Architecture, Optimizer, RunConfig
from moedisco_ray.core.families import DECLARATIONS, FamilyName
from moedisco_ray.plan.cost import PEAK_FLOPS, UTILISATION
from moedisco_ray.plan.memory import Exchange, compute_bytes, micro_batch_sequences, worker_sequences
from moedisco_ray.plan.parameters import Parameters, count_parameters
from moedisco_ray.policies.parallel import Layout, Sharing

LINK_BYTES_PER_SECOND = 300e9
"""Assumed speed at which GPUs of one node exchange data (bytes/s, each way): NVLink of the A100."""
_GRADIENT_BYTES = 4


class GangTraffic(BaseModel, frozen=True):
    """Bytes that each worker of a gang sends in one step."""

    bytes: int
    """Bytes with the configured layout."""
    sharded: int
    """Bytes if all weights are sharded among all workers (FSDP alone)."""
    divided: int
    """Bytes if experts are divided among all workers, as far as their number allows."""
    expert: int
    """Number of workers among which `divided` divides experts; the value of `finetune.parallel.expert`."""


def planned_layout(config: RunConfig, optimizer: Optimizer, workers: int) -> Layout:
    """The layout of a gang on nodes of one worker each.

    On larger nodes, settings that are null may give a layout that needs less memory and sends less.

    Args:
        config: The run's configuration.
        optimizer: Settings of the fine-tune's optimizer; Muon needs whole experts.
        workers: Number of workers.
    """
    parallel = config.finetune.parallel
    return Sharing(
        config.model.architecture.num_experts,
        parallel.expert,
        parallel.replicate,
        whole_experts=optimizer.name == "muon",
    ).layout(workers, 1)


def gang_traffic(
    family: FamilyName,
    architecture: Architecture,
    vocab_size: int,
    optimizer: Optimizer,
    *,
    sequence_length: int,
    gpu: int,
    layout: Layout,
    exchange: Exchange,
) -> GangTraffic:
    """Bytes that each worker sends in one step, with a layout and with the two others to compare it with."""
    workers = layout.replicate * layout.shards
    parameters = count_parameters(family, architecture, vocab_size)
    expert = max(n for n in range(1, workers + 1) if workers % n == 0 and architecture.num_experts % n == 0)
    found = (
        step_bytes(
            family,
            architecture,
            parameters,
            optimizer,
            sequence_length=sequence_length,
            gpu=gpu,
            layout=each,
            exchange=exchange,
        )
        for each in (layout, Layout(data=workers), Layout(data=workers // expert, expert=expert))
    )
    configured, sharded, divided = found
    return GangTraffic(bytes=configured, sharded=sharded, divided=divided, expert=expert)


def step_bytes(
    family: FamilyName,
    architecture: Architecture,
    parameters: Parameters,
    optimizer: Optimizer,
    *,
    sequence_length: int,
    gpu: int,
    layout: Layout,
    exchange: Exchange,
) -> int:
    """Bytes that each worker sends in one step, by the formula in the docstring of this module."""
    workers = layout.replicate * layout.shards
    width, sequences = compute_bytes(optimizer, gpu), worker_sequences(optimizer, sequence_length, workers)
    passes = 1 if exchange == "step" else -(-sequences // micro_batch_sequences(optimizer, sequence_length, workers))
    gathers = 1 if exchange == "step" else 2 * passes
    experts = parameters.experts if layout.expert > 1 else 0
    kept = parameters.embedding + parameters.head + architecture.hidden_size  # the root module of FSDP
    sent = _sharded(kept, layout.shards, layout.replicate, gathered=width * passes, reduced=_GRADIENT_BYTES * passes)
    for count, shards in ((parameters.total - kept - experts, layout.shards), (experts / layout.expert, layout.data)):
        sent += _sharded(count, shards, layout.replicate, gathered=width * gathers, reduced=_GRADIENT_BYTES * passes)
    selected = sequences * sequence_length * architecture.num_experts_per_tok * architecture.hidden_size
    layers = architecture.num_hidden_layers - DECLARATIONS[family].dense_layers(architecture.fields)
    travels = 6 if optimizer.gradient_checkpointing else 4
    return round(sent + travels * layers * selected * width * (1 - 1 / layout.expert))


def _sharded(count: float, shards: int, replicas: int, *, gathered: int, reduced: int) -> float:
    """Bytes that a worker sends for parameters that are sharded.

    Args:
        count: Number of parameters of all shards.
        shards: Number of workers that have a shard each.
        replicas: Number of replicas.
        gathered: Bytes per parameter that all gathers of a step together have as their result.
        reduced: Bytes per parameter of the gradients that all reductions of a step together have as their input.
    """
    return count * ((1 - 1 / shards) * (gathered + reduced) + 2 * (1 - 1 / replicas) * reduced / shards)


def with_exchange(flops: float, traffic: GangTraffic | None, pool: AnyPool, batch_tokens: int) -> float:
    """Operations per token, raised to those of the time that a step's exchange of data takes if that is longer."""
    if traffic is None or not pool.gpu:
        return flops
    seconds = traffic.bytes / LINK_BYTES_PER_SECOND
    return max(flops, seconds * pool.fewest_workers * PEAK_FLOPS * UTILISATION * pool.speed / batch_tokens)
