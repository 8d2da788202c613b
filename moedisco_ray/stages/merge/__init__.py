"""Sub-models into one Mixture-of-Experts: tensors joined one by one, then routers calibrated on data."""

from moedisco_ray.stages.merge.backbone import Recipe, merge_weights, recipes
from moedisco_ray.stages.merge.build import build_merged
from moedisco_ray.stages.merge.calibrate import Batch, RouterMethod, RouterSettings, calibrate
from moedisco_ray.stages.merge.moments import merge_moments
from moedisco_ray.stages.merge.tensors import TensorReport, merge, merge_with_report

__all__ = [
    "Batch", "Recipe", "RouterMethod", "RouterSettings", "TensorReport", "build_merged", "calibrate", "merge", "merge_moments",
    "merge_weights", "merge_with_report", "recipes",
]
