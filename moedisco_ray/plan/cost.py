"""Hours and dollars of training, from floating-point operations and the pools' prices.

The reference is one A100-80GB: 312 TFLOP/s in bf16 (its data sheet), of which 35 % are assumed to be reached; a pool's
`speed` scales it. Nothing but training is counted: reading, clustering and merging are minutes of CPU.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from moedisco_ray.config import Architecture, Finetune, Pool
from moedisco_ray.plan.parameters import Parameters

PEAK_FLOPS = 312e12
UTILISATION = 0.35


class Cost(BaseModel):
    """What training one stage takes."""

    model_config = ConfigDict(frozen=True)

    tokens: int
    """Of all units together."""
    flops: float
    waves: int
    """How often the pool is filled, when there are more units than it trains at once."""
    hours: float
    """Wall-clock."""
    worker_hours: float
    dollars: float


def flops_per_token(
    parameters: Parameters, architecture: Architecture, sequence_length: int, *, checkpointing: bool,
) -> float:
    """Operations of one training step per token.

    6 N + 12 l h d L (Chowdhery et al., PaLM, arXiv 2204.02311, appendix B), N being the parameters in a token's
    matrix products, l layers, h heads of size d, L the sequence length. Recomputing the forward pass adds a third.
    """
    heads = architecture.num_attention_heads * architecture.head_size
    attention = 12 * architecture.num_hidden_layers * heads * sequence_length
    return (6 * parameters.multiplied + attention) * (4 / 3 if checkpointing else 1)


def finetune_flops_per_token(
    parameters: Parameters, architecture: Architecture, sequence_length: int, finetune: Finetune,
) -> float:
    """`flops_per_token` of a fine-tune, on the average over its steps.

    Of the 6 operations per parameter 2 make its gradient, and a frozen one needs none. With a dense gate a token passes
    through all experts.
    """
    frozen = {
        "all": 0,
        "backbone": parameters.active_experts,
        "router": parameters.multiplied - parameters.router,
    }
    saved = sum(phase.share * 2 * frozen[phase.train] for phase in finetune.phases)
    checkpointing = finetune.optimizer.gradient_checkpointing
    passes = 8 if checkpointing else 6
    added = finetune.dense_gate * passes * (parameters.experts - parameters.active_experts)
    return flops_per_token(parameters, architecture, sequence_length, checkpointing=checkpointing) - saved + added


def training_cost(
    flops_each_token: float, tokens: int, pool: Pool, *, units: int = 1, at_once: int = 1, workers_per_unit: int = 1,
) -> Cost:
    """Cost of training `units` models that share `tokens` evenly.

    Args:
        flops_each_token: Operations per token.
        tokens: Of all units together.
        pool: Gives speed and price.
        units: Models that train independently.
        at_once: How many of them the pool has room for.
        workers_per_unit: Workers that share one model; an even split of its time is assumed.
    """
    flops = flops_each_token * tokens
    worker_hours = flops / (PEAK_FLOPS * UTILISATION * pool.speed) / 3600
    waves = -(-units // at_once)
    return Cost(
        tokens=tokens, flops=flops, waves=waves, hours=waves * worker_hours / units / workers_per_unit,
        worker_hours=worker_hours, dollars=worker_hours * pool.price_per_hour)
