"""Work of the stages that need a function of another stage; stages do not import each other, so it is passed in here.

`core.stages` names these functions, and directly those of the other stages.
"""

from __future__ import annotations

from moedisco_ray.core.store.artifacts import Draft
from moedisco_ray.stages import decompose
from moedisco_ray.stages.clustering.model import ClusterModel
from moedisco_ray.stages.context import Context
from moedisco_ray.stages.corpus.unseen import read_unseen
from moedisco_ray.stages.evaluate import stage as evaluation
from moedisco_ray.stages.train import seed as training


def seed(context: Context, draft: Draft) -> None:
    """Train the seed; it starts from the decomposition of the model that the run starts from."""
    training.run(context, draft, write_common_start=decompose.write_common_start)


def evaluate(context: Context, draft: Draft) -> None:
    """Measure the models; clusters and text that was not trained on are read by the stages that write them."""
    evaluation.run(context, draft, readers=evaluation.Readers(ClusterModel.load, read_unseen))
