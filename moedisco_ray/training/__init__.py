"""The training engine: one loop for the seed model, the sub-models and the merged model."""

from moedisco_ray.training.arithmetic import arithmetic_of
from moedisco_ray.training.job import DataShare, HeldOut, SyncPlan, TrainJob, TrainResult, World, devices_of
from moedisco_ray.training.loop import train, train_in_turns
from moedisco_ray.training.optimizer import learning_rate
from moedisco_ray.training.results import read_partial_result, write_partial_result
from moedisco_ray.training.sync.coordinator import Board, MemberBoard, SyncCoordinator

__all__ = [
    "Board",
    "DataShare",
    "HeldOut",
    "MemberBoard",
    "SyncCoordinator",
    "SyncPlan",
    "TrainJob",
    "TrainResult",
    "World",
    "arithmetic_of",
    "devices_of",
    "learning_rate",
    "read_partial_result",
    "train",
    "train_in_turns",
    "write_partial_result",
]
