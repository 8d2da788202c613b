"""Models that are ready to train, on one device or sharded over the workers of a gang (FSDP2), and their full weights."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moedisco_ray.core.config import Optimizer
from moedisco_ray.models import load_model, specialise
from moedisco_ray.training.cross_entropy import summed_cross_entropy
from moedisco_ray.training.job import World


def compute_dtype(optimizer: Optimizer, device: str) -> torch.dtype:
    """The dtype of the forward and backward pass."""
    return torch.bfloat16 if optimizer.arithmetic(gpu=torch.device(device).type != "cpu") == "bf16" else torch.float32


def trainable(directory: Path, optimizer: Optimizer, world: World) -> PreTrainedModel:
    """Load a model for training, with the precision and gradient checkpointing of the optimizer settings.

    Its `forward` returns the loss; see `SummedLoss`. With several workers only rank 0 reads the weights, and no other worker ever
    holds a whole model.

    Raises:
        CheckpointError: The directory holds no model of a supported family.
    """
    dtype = torch.bfloat16 if optimizer.state == "bf16" else torch.float32
    if world.size == 1:
        return _configured(load_model(directory, dtype).to(world.device), optimizer)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=dtype)
    _configured(model, optimizer)
    _shard(model, compute_dtype(optimizer, world.device), world)
    _distribute(model, load_model(directory, dtype) if world.rank == 0 else None, world)
    return model


class SummedLoss:
    """Base class that makes a causal language model return its loss instead of logits, which can be larger than the model."""

    def forward(self, input_ids: Tensor, targets_BL: Tensor, positions_BL: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats, summed over all tokens.

        Args:
            input_ids: Token ids [B, L].
            targets_BL: Token that follows each position; -100 excludes a position.
            positions_BL: Position of each token in its document. Wherever a position is not its predecessor plus one, transformers
                starts a new document, whose tokens attend to no earlier document. None means one document per sequence.
        """
        model: Any = self
        hidden_BLD = model.base_model(input_ids=input_ids, position_ids=positions_BL, use_cache=False).last_hidden_state
        return summed_cross_entropy(hidden_BLD.flatten(0, 1), model.get_output_embeddings().weight, targets_BL.flatten())


def autocast(optimizer: Optimizer, world: World) -> contextlib.AbstractContextManager[Any]:
    """Context for forward passes with bf16 arithmetic on fp32 weights; sharded models need none, because FSDP casts weights."""
    if world.size == 1 and optimizer.state == "fp32" and compute_dtype(optimizer, world.device) is torch.bfloat16:
        return torch.autocast(torch.device(world.device).type, torch.bfloat16)
    return contextlib.nullcontext()


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """All weights on the CPU of rank 0, an empty mapping on other workers. Every worker must call it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _configured(model: PreTrainedModel, optimizer: Optimizer) -> PreTrainedModel:
    # `specialise` also freezes the routers of one-expert layers: they get no gradient, but would get weight decay.
    specialise(model).train()
    kind = type(model)
    # FSDP gathers the output head's weight only while the whole model's `forward` runs, so the loss is computed in `forward`.
    model.__class__ = type(kind.__name__, (SummedLoss, kind), {})
    if optimizer.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def _shard(model: PreTrainedModel, dtype: torch.dtype, world: World) -> None:
    mesh = init_device_mesh(torch.device(world.device).type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by the tokens of the global batch, so gradients are summed. Gloo supports plain sums only.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(enable=True)


def _distribute(model: PreTrainedModel, source: PreTrainedModel | None, world: World) -> None:
    model.to_empty(device=world.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, source.state_dict() if source is not None else {}, options=options)
    # Rotary frequencies are buffers that are not in the state dict.
    buffers = dict(source.named_buffers()) if source is not None else {}
    for name, buffer in model.named_buffers():
        if source is not None:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, 0)
