"""The one training loop, for the seed model, the sub-models and the merge fine-tune."""

from moedisco_ray.training.job import BackboneRate, HeldOut, Rounds, TrainJob, TrainResult, World, steps_for
from moedisco_ray.training.loop import train, training
from moedisco_ray.training.partial_result import standing, write_standing
from moedisco_ray.training.schedule import learning_rate
from moedisco_ray.training.sync.coordinator import Keeper

__all__ = [
    "BackboneRate", "HeldOut", "Keeper", "Rounds", "TrainJob", "TrainResult", "World", "learning_rate", "standing", "steps_for",
    "train", "training", "write_standing",
]
