"""Model families: the role of every tensor, checkpoints read and written in one canonical form, models built and loaded."""

from moedisco_ray.model_map.checkpoint import Checkpoint, open_checkpoint, read_config, write_checkpoint, write_config
from moedisco_ray.model_map.compare import check_same, differences
from moedisco_ray.model_map.families import DECLARATIONS, PARTS, Family, Part, Role, TensorRole
from moedisco_ray.model_map.hf import (
    canonical_shapes,
    hf_config,
    load_model,
    moe_blocks,
    save_model,
    skeleton,
    submodel_config,
)
from moedisco_ray.model_map.init import RandomSource, random_source
from moedisco_ray.model_map.layout import ModelMap, Place, canonical_state, memory_state
from moedisco_ray.model_map.speed import specialise

__all__ = [
    "DECLARATIONS", "PARTS", "Checkpoint", "Family", "ModelMap", "Part", "Place", "RandomSource", "Role", "TensorRole",
    "canonical_shapes", "canonical_state", "check_same", "differences", "hf_config", "load_model", "memory_state", "moe_blocks",
    "open_checkpoint", "random_source", "read_config", "save_model", "skeleton", "specialise", "submodel_config",
    "write_checkpoint", "write_config",
]
