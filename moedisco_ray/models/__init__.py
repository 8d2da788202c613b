"""Model families: the roles of their tensors, checkpoints in one canonical form, and functions that build and load models."""

from moedisco_ray.models.checkpoint import (
    BACKBONE,
    Checkpoint,
    open_checkpoint,
    read_config,
    read_generation_config,
    reading_thread,
    write_config,
)
from moedisco_ray.models.checkpoint_writer import write_checkpoint, write_part
from moedisco_ray.models.checks import (
    check_complete,
    check_experts,
    check_same,
    check_start_tensors,
    differences,
    expert_count,
    group_size,
    open_complete,
    same_bits,
)
from moedisco_ray.models.dense import OneExpert, open_dense, upcycled_config
from moedisco_ray.models.freed_memory import reused_memory
from moedisco_ray.models.hf import (
    backbone_parameters,
    canonical_shapes,
    config_values,
    family_of,
    from_values,
    head_inputs,
    hf_config,
    load_model,
    model_tensors,
    moe_blocks,
    routers,
    save_model,
    skeleton,
    stored_tensors,
    submodel_config,
    with_parameters_in,
)
from moedisco_ray.models.initial_weights import RandomWeights, random_weights
from moedisco_ray.models.layout import ModelMap, Piece, Place, canonical_state
from moedisco_ray.models.llama_moe import LlamaMoEForCausalLM
from moedisco_ray.models.roles import Role, TensorRole
from moedisco_ray.models.routing import Selection, log_probabilities, probabilities, row_inputs, scores
from moedisco_ray.models.shard_file import STORED_DTYPES, Stored
from moedisco_ray.models.speed import expert_hidden, runnable, specialise

__all__ = [
    "BACKBONE", "STORED_DTYPES", "Checkpoint", "LlamaMoEForCausalLM", "ModelMap", "OneExpert",
    "Piece", "Place", "RandomWeights", "Role", "Selection", "Stored", "TensorRole", "backbone_parameters", "canonical_shapes",
    "canonical_state", "check_complete", "check_experts", "check_same", "check_start_tensors", "config_values",
    "differences", "expert_count", "expert_hidden", "family_of", "from_values", "group_size",
    "head_inputs", "hf_config", "load_model", "log_probabilities", "model_tensors", "moe_blocks", "open_checkpoint",
    "open_complete", "open_dense", "probabilities", "random_weights", "read_config",
    "read_generation_config", "reading_thread", "reused_memory", "routers",
    "row_inputs", "runnable", "same_bits", "save_model", "scores", "skeleton", "specialise", "stored_tensors", "submodel_config",
    "upcycled_config", "with_parameters_in", "write_checkpoint", "write_config", "write_part",
]
