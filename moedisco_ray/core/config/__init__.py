"""The run configuration, as frozen pydantic models that import neither torch nor Ray."""

from moedisco_ray.core.config.architecture import Architecture
from moedisco_ray.core.config.inits import CheckpointInit, LocalInit, UpcycleInit
from moedisco_ray.core.config.load import check_config, check_evaluation, load_config, put
from moedisco_ray.core.config.model import Model
from moedisco_ray.core.config.optimizer import Lora, Optimizer
from moedisco_ray.core.config.pool import MachineType, Pool, PoolName, PricePerHour, Residence, Tag
from moedisco_ray.core.config.pools import AnyPool, HighMemoryPool, LowMemoryPool, Owner, Pools
from moedisco_ray.core.config.run import MOST_TAGS, RunConfig, TagKey, TagValue
from moedisco_ray.core.config.sections import (
    Checkpoint,
    Clusters,
    Corpus,
    Evaluation,
    Export,
    Finetune,
    Merge,
    Outer,
    Submodels,
    Tokenizer,
    Tokens,
    Tracking,
    TrainingStageName,
)
from moedisco_ray.core.config.sources import CorpusSource, Source
from moedisco_ray.core.config.start_sizes import EXPERT_COUNTS, read_architecture
from moedisco_ray.core.config.tokenizers import tokenizer_directory, tokenizer_files
from moedisco_ray.core.families import FAMILIES, FamilyName

__all__ = [
    "EXPERT_COUNTS",
    "FAMILIES",
    "MOST_TAGS",
    "AnyPool",
    "Architecture",
    "Checkpoint",
    "CheckpointInit",
    "Clusters",
    "Corpus",
    "CorpusSource",
    "Evaluation",
    "Export",
    "FamilyName",
    "Finetune",
    "HighMemoryPool",
    "LocalInit",
    "Lora",
    "LowMemoryPool",
    "MachineType",
    "Merge",
    "Model",
    "Optimizer",
    "Outer",
    "Owner",
    "Pool",
    "PoolName",
    "Pools",
    "PricePerHour",
    "Residence",
    "RunConfig",
    "Source",
    "Submodels",
    "Tag",
    "TagKey",
    "TagValue",
    "Tokenizer",
    "Tokens",
    "Tracking",
    "TrainingStageName",
    "UpcycleInit",
    "check_config",
    "check_evaluation",
    "load_config",
    "put",
    "read_architecture",
    "tokenizer_directory",
    "tokenizer_files",
]
