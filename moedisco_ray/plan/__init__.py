"""Plan of a run before it starts: parameters, memory, hours and dollars. No torch, no Ray."""

from moedisco_ray.core.records.ways import Alternative
from moedisco_ray.plan.build import Plan, build_plan, decided, fitted, readings, too_large
from moedisco_ray.plan.cluster_count import with_cluster_count
from moedisco_ray.plan.cost import Cost
from moedisco_ray.plan.memory import GIB, Memory, worker_memory
from moedisco_ray.plan.parameters import Parameters, count_parameters, submodel_architecture
from moedisco_ray.plan.remedy import Remedy, find_remedy
from moedisco_ray.plan.stage_plan import StagePlan
from moedisco_ray.plan.sync_traffic import Sync
from moedisco_ray.plan.vocabulary import planned_vocab_size, tokenizer_vocab_size
from moedisco_ray.plan.worker_plan import InferencePlan

__all__ = [
    "GIB",
    "Alternative",
    "Cost",
    "InferencePlan",
    "Memory",
    "Parameters",
    "Plan",
    "Remedy",
    "StagePlan",
    "Sync",
    "build_plan",
    "count_parameters",
    "decided",
    "find_remedy",
    "fitted",
    "planned_vocab_size",
    "readings",
    "submodel_architecture",
    "tokenizer_vocab_size",
    "too_large",
    "with_cluster_count",
    "worker_memory",
]
