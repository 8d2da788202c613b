"""Models that are ready to train, on one device or sharded over the workers of a gang (FSDP2)."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from moedisco_ray.core.cards import BF16_CAPABILITY
from moedisco_ray.core.config import Lora, Optimizer, Residence
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.printable import one_line
from moedisco_ray.models import head_inputs, moe_blocks, open_complete, specialise, with_parameters_in
from moedisco_ray.models.attention import attend_within_documents, document_arguments
from moedisco_ray.models.expert_parallel import EXPERT_AXIS, divide
from moedisco_ray.plan.memory import Exchange
from moedisco_ray.policies.parallel import Layout
from moedisco_ray.training.consensus import on_all
from moedisco_ray.training.cross_entropy import summed_cross_entropy
from moedisco_ray.training.job import World
from moedisco_ray.training.lora import add_adapters, start_adapters, unadapted_tensors
from moedisco_ray.training.sharded_files import reader


def compute_dtype(optimizer: Optimizer, device: str) -> torch.dtype:
    """The dtype of the forward and backward pass."""
    return torch.bfloat16 if optimizer.arithmetic(bf16=torch.device(device).type != "cpu") == "bf16" else torch.float32


def check_arithmetic(optimizer: Optimizer, device: str) -> None:
    """Refuse to compute in bf16 on a GPU without it, which would imitate it many times as slowly.

    Raises:
        ConfigError: The GPU has no bf16.
    """
    if torch.device(device).type != "cuda" or compute_dtype(optimizer, device) != torch.bfloat16:
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < BF16_CAPABILITY:
        name, version = one_line(torch.cuda.get_device_name(device)), ".".join(map(str, capability))
        raise ConfigError(
            "optimizer.precision",
            optimizer.precision,
            f"{name} (compute capability {version}) has no bf16; name the card in pools.*.card, or set fp32",
        )


def trainable(
    directory: Path,
    optimizer: Optimizer,
    world: World,
    group: dist.ProcessGroup | None = None,
    exchange: Exchange = "step",
    *,
    lora: Lora | None = None,
    seed: int = 0,
    memory: Residence = "resident",
) -> PreTrainedModel:
    """Load a model for training, with the optimizer settings' precision and gradient checkpointing; see `SummedLoss`.

    With several workers the model is sharded, and each reads its own part of the weights. Every worker must call it.

    Args:
        directory: A Hugging Face model directory.
        optimizer: Precision and gradient checkpointing.
        world: Rank and device of this worker, and the number of workers.
        group: Process group for coordination, see `sharded_files.cpu_group`; None: the default group.
        exchange: How often workers exchange weights and gradients; see `Exchanges`.
        lora: Adapters to train instead of the weights, on one worker; None: the weights are trained.
        seed: Seed of the adapters' initial values.
        memory: Where the weights are; `streamed` keeps them in the host's memory.

    Raises:
        CheckpointError: The directory holds no model of a supported family.
        ConfigError: The setting `within_documents` does not suit the model's layers.
        ValueError: Several workers train adapters.
    """
    if lora is not None and world.size > 1:
        raise ValueError("a training of adapters must have one worker")
    stored, config = open_complete(directory)
    trained = torch.bfloat16 if optimizer.state == "bf16" else torch.float32
    with torch.device("meta"):
        dtype = trained if lora is None else compute_dtype(optimizer, world.device)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if optimizer.within_documents:
        attend_within_documents(model, world.device, compute_dtype(optimizer, world.device))
    if memory == "streamed":  # which computes every layer again by itself
        optimizer = optimizer.model_copy(update={"gradient_checkpointing": False})
    configured(with_parameters_in(model, dtype), optimizer)
    if world.size > 1:
        _shard(model, compute_dtype(optimizer, world.device), world, exchange)
    if lora is not None:
        add_adapters(model, lora, dtype=trained)
    model.to_empty(device="cpu" if memory == "streamed" else world.device)
    model.tie_weights()
    # Rotary frequencies are computed, not stored.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(world.device)
    read = reader(stored)
    on_all(lambda: read(unadapted_tensors(model)), world, group)
    start_adapters(model, read, seed=seed)
    return model


class Exchanges:
    """Decides for each micro-batch of a step whether the workers of a sharded model exchange weights and gradients.

    With `step`, each worker gathers all weights once, and adds up whole gradients, which are reduced after the last
    micro-batch. With `micro_batch`, each micro-batch gathers the weights of a layer twice and reduces its gradients.
    """

    def __init__(self, model: PreTrainedModel, exchange: Exchange) -> None:
        self._model = model if isinstance(model, FSDPModule) and exchange == "step" else None

    def before(self, *, last: bool) -> None:
        """Prepare for a micro-batch, which may be the last of its step."""
        if self._model is not None:
            self._model.set_requires_gradient_sync(last)
            self._model.set_reshard_after_backward(last)
            self._model.set_is_last_backward(last)


def reshard(model: PreTrainedModel) -> None:
    """Free weights that a forward pass without a backward pass has gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class SummedLoss:
    """Base class that makes a causal language model return its loss, not logits, which can be larger than the model.

    Attributes:
        head_weight: Weight of the head, if its gradient is to be apart from that of the embedding; None: the model's.
    """

    head_weight: Tensor | None = None

    def forward(self, input_ids: Tensor, targets_BL: Tensor, positions_BL: Tensor | None = None) -> Tensor:
        """Cross-entropy in nats, summed over all tokens.

        Args:
            input_ids: Token ids [B, L].
            targets_BL: Token that follows each position; -100 excludes a position.
            positions_BL: Position of each token in its document, whose tokens attend to no earlier document. None means
                one document per sequence.
        """
        model: Any = self
        documents = document_arguments(model, input_ids, positions_BL)
        hidden_BLD = model.base_model(input_ids=input_ids, use_cache=False, **documents).last_hidden_state
        hidden_TD = head_inputs(model, hidden_BLD.flatten(0, 1))
        head = model.get_output_embeddings()
        weight = head.weight if self.head_weight is None else self.head_weight
        return summed_cross_entropy(hidden_TD, weight, targets_BL.flatten(), head.bias)


def autocast(optimizer: Optimizer, world: World) -> contextlib.AbstractContextManager[Any]:
    """Context for forward passes in bf16 on fp32 weights; sharded models need none, because FSDP casts weights."""
    if world.size == 1 and optimizer.state == "fp32" and compute_dtype(optimizer, world.device) is torch.bfloat16:
        return torch.autocast(torch.device(world.device).type, torch.bfloat16)
    return contextlib.nullcontext()


def configured(model: PreTrainedModel, optimizer: Optimizer) -> PreTrainedModel:
    # `specialise` also freezes the routers of one-expert layers: they get no gradient, but would get weight decay.
    specialise(model).train()
    kind = type(model)
    # FSDP gathers the output head's weight only while the whole model's `forward` runs, so the loss is computed in
    # `forward`.
    model.__class__ = type(kind.__name__, (SummedLoss, kind), {})
    if optimizer.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def _shard(model: PreTrainedModel, dtype: torch.dtype, world: World, exchange: Exchange) -> None:
    layout, kind = world.layout or Layout(data=world.size), torch.device(world.device).type
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    wrap = functools.partial(fully_shard, mp_policy=policy, reshard_after_forward=exchange == "micro_batch")
    replicas = layout.replicate > 1
    names = ("replicate", "shard")[not replicas :]
    mesh = init_device_mesh(kind, (layout.replicate, layout.shards)[not replicas :], mesh_dim_names=names)
    if layout.expert > 1:
        sizes = (layout.replicate, layout.data, layout.expert)[not replicas :]
        axes = init_device_mesh(kind, sizes, mesh_dim_names=("replicate", "data", EXPERT_AXIS)[not replicas :])
        # Norms are then reduced in one operation.
        axes["data", EXPERT_AXIS]._flatten()  # noqa: SLF001 - torch has no public name
        for block in moe_blocks(model).values():
            experts: Any = block.get_submodule("experts")
            _divide(experts, axes[EXPERT_AXIS])
            # An uneven number of experts is sharded by rows.
            axis = 1 if experts.num_experts // layout.expert % layout.data else 0
            wrap(
                experts,
                mesh=axes["replicate", "data"] if replicas else axes["data"],
                shard_placement_fn=lambda _parameter, axis=axis: Shard(axis),
            )
    for layer in model.model.layers:
        wrap(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by the tokens of the global batch, so gradients are summed. Gloo supports plain sums
            # only.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(enable=True)


def _divide(experts: nn.Module, mesh: DeviceMesh) -> None:
    """Keep this worker's experts of a module on the meta device."""
    for name, weight_EAB in list(experts.named_parameters(recurse=False)):
        part = torch.empty(len(weight_EAB) // mesh.size(), *weight_EAB.shape[1:], dtype=weight_EAB.dtype, device="meta")
        divided = DTensor.from_local(part, mesh, [Shard(0)], shape=weight_EAB.shape, stride=weight_EAB.stride())
        setattr(experts, name, nn.Parameter(divided, requires_grad=weight_EAB.requires_grad))
    divide(experts, mesh.get_group())
