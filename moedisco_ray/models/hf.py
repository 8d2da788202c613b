"""Create transformers configurations and models from a run's settings and from model directories."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from moedisco_ray.core.config import EXPERT_COUNTS, Architecture, FamilyName
from moedisco_ray.core.errors import CheckpointError, ConfigError
from moedisco_ray.core.families import DECLARATIONS, Family, Router
from moedisco_ray.core.limits import SHARD_BYTES
from moedisco_ray.core.store.read_roots import check_folder, check_inside
from moedisco_ray.models.checkpoint import read_config, weight_files
from moedisco_ray.models.checkpoint_writer import write_checkpoint
from moedisco_ray.models.layout import ModelMap, canonical_state
from moedisco_ray.models.roles import Role


def hf_config(
    family: FamilyName, architecture: Architecture, vocab_size: int, sequence_length: int, eos_token_id: int
) -> PretrainedConfig:
    """The transformers configuration of a model; each size of `architecture` is mapped to the field of the family.

    The same token begins and ends a text. No padding token is set, because documents are packed without padding, and
    transformers would exclude the embedding of a padding token from training.

    Args:
        family: Model family.
        architecture: Sizes of the model.
        vocab_size: Vocabulary size of the tokenizer; `architecture.vocab_size` overrides it and may be larger.
        sequence_length: Maximum sequence length, unless the architecture sets one.
        eos_token_id: Token between documents.

    Raises:
        ConfigError: The family does not support this architecture.
    """
    declaration = ModelMap(family).family
    if architecture.vocab_size is not None and architecture.vocab_size < vocab_size:
        raise ConfigError(
            "model.config.vocab_size",
            architecture.vocab_size,
            f"is smaller than the tokenizer's {vocab_size} tokens; raise it or remove it",
        )
    fields: dict[str, Any] = {
        "vocab_size": architecture.vocab_size or vocab_size,
        "hidden_size": architecture.hidden_size,
        "num_hidden_layers": architecture.num_hidden_layers,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.key_value_heads,
        declaration.router.top_k_field: architecture.num_experts_per_tok,
        "max_position_embeddings": architecture.max_position_embeddings or sequence_length,
        "tie_word_embeddings": architecture.tie_word_embeddings,
        "rope_parameters": {
            "rope_type": "default",
            **(architecture.rope_scaling or {}),
            "rope_theta": architecture.rope_theta,
        },
        "rms_norm_eps": architecture.rms_norm_eps,
        "initializer_range": architecture.initializer_range,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "output_router_logits": False,
        "dtype": "float32",
        declaration.num_experts_field: architecture.num_experts,
        declaration.expert_size_field: architecture.moe_intermediate_size,
        **declaration.constants,
        **{name: declaration.value(architecture.fields, name) for name in declaration.fields},
    }
    if declaration.router.normalises == "by_setting":
        fields["norm_topk_prob"] = architecture.norm_topk_prob
    if declaration.dense_layers_list is not None:
        layers = architecture.num_hidden_layers
        dense = declaration.dense_layers(architecture.fields)
        fields[declaration.dense_layers_list] = declaration.dense_layer_kinds(dense, layers)
    if declaration.own_expert_size:
        fields["intermediate_size"] = fields.get("intermediate_size") or architecture.moe_intermediate_size
    if declaration.shared is not None and declaration.shared.size_field is not None:
        fields[declaration.shared.size_field] = (
            architecture.shared_expert_intermediate_size or architecture.moe_intermediate_size
        )
    if declaration.attention.own_head_dim:
        fields["head_dim"] = architecture.head_size
    elif (
        not declaration.attention.latent
        and architecture.head_size * architecture.num_attention_heads != architecture.hidden_size
    ):
        raise ConfigError(
            "model.config.head_dim",
            architecture.head_dim,
            f"{family} computes it as hidden_size / num_attention_heads; remove it, or use qwen3_moe",
        )
    return AutoConfig.for_model(family, **fields)


def config_values(config: PretrainedConfig) -> dict[str, Any]:
    """The values of `config.json` for a configuration, with the family's own name for the number of experts.

    For some families transformers writes the number of experts under a name that other tools do not know.
    """
    values: dict[str, Any] = config.to_diff_dict()
    family = ModelMap(str(config.model_type)).family
    for name in EXPERT_COUNTS:
        values.pop(name, None)
    values[family.num_experts_field] = int(getattr(config, family.num_experts_field))
    values["architectures"] = [family.architecture or _model_class(config).__name__]
    return values


def submodel_config(config: Mapping[str, Any], experts_per_submodel: int) -> dict[str, Any]:
    """Values of a sub-model's `config.json`: those of the whole MoE, with fewer experts and a router that fits them.

    Raises:
        ConfigError: The router cannot be divided in this way.
    """
    family = ModelMap(str(config.get("model_type"))).family
    whole = from_values(config)
    experts = int(getattr(whole, family.num_experts_field))
    try:
        router = family.router.submodel_fields(whole.to_dict(), experts, experts_per_submodel)
    except ValueError as error:
        raise ConfigError("clusters.count", experts // experts_per_submodel, str(error)) from error
    values = {key: value for key, value in config.items() if key not in EXPERT_COUNTS}
    size = {family.expert_size_field: getattr(whole, family.expert_size_field)}
    return values | router | size | {family.num_experts_field: experts_per_submodel}


def from_values(config: Mapping[str, Any]) -> PretrainedConfig:
    """The configuration object for the values of a `config.json`."""
    values = {key: value for key, value in config.items() if key != "model_type"}
    return AutoConfig.for_model(str(config.get("model_type")), **values)


def skeleton(config: Mapping[str, Any] | PretrainedConfig) -> PreTrainedModel:
    """A model on the meta device: it has all modules and shapes, but its weights take no memory."""
    found = config if isinstance(config, PretrainedConfig) else from_values(config)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(found)
    family = DECLARATIONS.get(model.config.model_type)
    correction = None if family is None else family.router.correction
    # transformers 5.21 makes it in the dtype of the weights, in which it selects other experts
    if correction is not None:
        for name, tensor in (*model.named_buffers(), *model.named_parameters()):
            if name.endswith(f".{correction}"):
                tensor.data = tensor.data.float()
    return model


def with_parameters_in(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Store all parameters of a model in one dtype, in place; return the model.

    transformers keeps some routers in fp32, but optimizers and sharding need one dtype. Buffers such as the correction
    of a router keep theirs: they are not trained. Where this correction is a parameter without gradients, it becomes a
    buffer.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.data)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def canonical_shapes(config: Mapping[str, Any] | PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every canonical tensor of a model on disk, from its configuration."""
    values = config.to_dict() if isinstance(config, PretrainedConfig) else dict(config)
    return dict(_shapes(_Described(json.dumps(values, sort_keys=True, default=str), config)))


@dataclasses.dataclass(frozen=True)
class _Described:
    """A configuration; it equals others with the same values."""

    values: str
    config: Mapping[str, Any] | PretrainedConfig = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=8)  # stages ask for the same ones again and again, and a skeleton takes a while
def _shapes(described: _Described) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in model_tensors(skeleton(described.config))}


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a local model directory, without network access and without running code from the directory.

    Raises:
        CheckpointError: The directory cannot be read, its family is not supported, or its tensors do not fit its
            `config.json`.
    """
    ModelMap(str(read_config(directory).get("model_type")))
    try:
        check_folder(directory)  # because transformers opens the files itself, without the checks of `opened`
        for path in weight_files(directory):
            check_inside(path)
        with no_progress_bar():
            model, info = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError("checkpoint", str(directory), f"cannot be loaded ({error})") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            example = min(map(str, info[problem]))
            raise CheckpointError(
                "checkpoint",
                str(directory),
                f"{problem.replace('_', ' ')}: {example} and {len(info[problem]) - 1} "
                "more; the weights do not belong to its config.json",
            )
    return with_parameters_in(model, dtype)


def model_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The canonical tensors of a model as they are written to disk: without the head if it is tied to the embedding."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    yield from canonical_state(state, ModelMap(str(model.config.model_type))).items()


def save_model(
    model: PreTrainedModel,
    directory: Path,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write a model directory in the canonical per-expert form.

    Args:
        model: The model; its configuration is always written, its tensors only if `tensors` is None.
        directory: Target directory.
        tensors: Canonical tensors to write instead of the model's, such as those gathered from many workers.
        max_shard_bytes: Maximum file size, as in `write_checkpoint`.

    Returns:
        Size of all tensors in bytes.
    """
    chosen = model_tensors(model) if tensors is None else tensors
    return write_checkpoint(directory, chosen, config_values(model.config), max_shard_bytes)


def moe_blocks(model: nn.Module) -> dict[int, nn.Module]:
    """The MoE blocks of a model, each with a router and `experts`, by layer index; dense layers have none."""
    layers = enumerate(model.get_submodule("model.layers").children())
    return {index: block for index, layer in layers for block in layer.children() if hasattr(block, "experts")}


def routers(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The routers of a model by layer index; a router returns logits, weights and indices of the selected experts."""
    name = family_of(model).router.module
    return {index: block.get_submodule(name) for index, block in moe_blocks(model).items()}


def run_router(block: nn.Module, router: Router, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of all experts, and weights and indices of the selected ones, from the router of an MoE block."""
    given = (getattr(block, str(router.correction)),) if router.correction_of_block else ()
    found: tuple[Tensor, Tensor, Tensor] = block.get_submodule(router.module)(x_TD, *given)
    return found


def family_of(model: PreTrainedModel) -> Family:
    return ModelMap(str(model.config.model_type)).family


def head_inputs(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The last hidden states, scaled so that the output head's products are logits, which some families divide."""
    field = family_of(model).logits_divisor
    return hidden if field is None else hidden / getattr(model.config, field)


def stored_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a model that are stored, by name: parameters, and buffers such as the correction of a router."""
    stored = model.state_dict().keys()
    return {**dict(model.named_parameters()), **{name: each for name, each in model.named_buffers() if name in stored}}


def backbone_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters that all sub-models share and the merge averages: all but experts and routers.

    Returns:
        Parameters by canonical name, which is also their name in memory.
    """
    names = ModelMap(str(model.config.model_type))
    common = (Role.BACKBONE, Role.SHARED_EXPERT)
    return {name: p for name, p in model.named_parameters() if names.role_in_memory(name, tuple(p.shape)) in common}


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """Hide transformers' progress bars in the block, which would disturb what the command or the run shows."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    return AutoModelForCausalLM._model_mapping[type(config)]  # noqa: SLF001 - the public way is to build the model
