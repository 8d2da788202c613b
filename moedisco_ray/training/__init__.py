"""The one training loop, for the seed model, the sub-models and the merge fine-tune."""

from moedisco_ray.training.job import HeldOut, Rounds, TrainJob, TrainResult, World, steps_for
from moedisco_ray.training.loop import train, training
from moedisco_ray.training.partial_result import read_partial_result, write_partial_result
from moedisco_ray.training.schedule import learning_rate
from moedisco_ray.training.sync.coordinator import SyncCoordinator

__all__ = [
    "HeldOut",
    "Rounds",
    "SyncCoordinator",
    "TrainJob",
    "TrainResult",
    "World",
    "learning_rate",
    "read_partial_result",
    "steps_for",
    "train",
    "training",
    "write_partial_result",
]
