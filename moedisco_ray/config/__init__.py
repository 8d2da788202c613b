"""The run configuration: frozen pydantic models, no torch, no Ray."""

from moedisco_ray.config.load import check_config, check_evaluation, load_config, put
from moedisco_ray.config.model import FAMILIES, Architecture, CheckpointInit, FamilyName, Model, read_architecture
from moedisco_ray.config.pools import AnyPool, HighMemoryPool, LowMemoryPool, MachineType, Pool, PoolName, Pools
from moedisco_ray.config.run import RunConfig
from moedisco_ray.config.sections import (
    Checkpoint,
    Clusters,
    Corpus,
    Evaluation,
    Finetune,
    Merge,
    Optimizer,
    Outer,
    Phase,
    Source,
    Submodels,
    Tokenizer,
    Tokens,
    Tracking,
)

__all__ = [
    "FAMILIES",
    "AnyPool",
    "Architecture",
    "Checkpoint",
    "CheckpointInit",
    "Clusters",
    "Corpus",
    "Evaluation",
    "FamilyName",
    "Finetune",
    "HighMemoryPool",
    "LowMemoryPool",
    "MachineType",
    "Merge",
    "Model",
    "Optimizer",
    "Outer",
    "Phase",
    "Pool",
    "PoolName",
    "Pools",
    "RunConfig",
    "Source",
    "Submodels",
    "Tokenizer",
    "Tokens",
    "Tracking",
    "check_config",
    "check_evaluation",
    "load_config",
    "put",
    "read_architecture",
]
