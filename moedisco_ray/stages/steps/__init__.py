"""The steps of the pipeline: what each stage does with its `Context` and its draft."""

from moedisco_ray.stages.steps.context import Context
from moedisco_ray.stages.steps.of_stages import STEPS

__all__ = ["STEPS", "Context"]
