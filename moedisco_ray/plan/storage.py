"""Bytes that each stage keeps in the run directory, on a card, in memory and on a node's disk, and that it moves.

If the run directory is in object storage, no node's disk holds it. A worker's disk then holds the stage's inputs, its
results until they are uploaded, and one checkpoint until it is uploaded. The figures follow from the sizes of models
and from token counts:

* models: weights in the training's precision;
* checkpoints: weights and optimizer state; each training keeps two checkpoints at a time;
* seed and sub-models: every sync adds the bytes that `plan.sync_traffic` counts.
* seed: every member reads all packed tokens of the seed phase and writes the finished model; the run keeps one copy;
* fine-tune, and a seed of several workers: they also send each other what `plan.gang_traffic` counts;
* other stages: `plan.stages` has a page of each.

`plan.stage_memory` has the memory of the stages that run text through a model. Without a card, it is in the machine's
memory. `plan.host_memory` bounds the memory of corpus, cluster and decompose.

The number of checkpoints follows from `checkpoint.every` or, with `auto`, from the interval for the assumed rate of
worker losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.stages import STAGES, TrainingStage, training_stage
from moedisco_ray.plan.files import Files, StageStorage, Trained
from moedisco_ray.plan.stage_cost import cost_of
from moedisco_ray.plan.worker_plan import InferencePlan


def plan_storage(
    config: RunConfig,
    trained: Mapping[str, Trained],
    inference: Sequence[InferencePlan],
    vocab_size: int,
    text_bytes: int | None,
) -> tuple[StageStorage, ...]:
    """Storage of every stage that stores files, in pipeline order.

    Args:
        config: The run's configuration.
        trained: Facts about the training stages, by stage.
        inference: The stages that run text through a model without training it.
        vocab_size: Entries of the vocabulary.
        text_bytes: Size of the corpus (bytes). If it is None, the corpus is assumed to have `tokens.total` tokens.
    """
    files = Files(config, trained, {each.stage: each for each in inference}, vocab_size, text_bytes)
    found = (
        files.training(stage, trained[stage.name])
        if isinstance(stage, TrainingStage) and stage.name in trained
        else cost_of(stage).storage(files)
        for stage in STAGES
    )
    return tuple(each for each in found if each is not None)


def joint_storage(config: RunConfig, whole: Trained, vocab_size: int) -> StageStorage:
    """Storage of a training of the whole model on all tokens, without sub-models.

    Args:
        config: The run's configuration.
        whole: Facts about this training.
        vocab_size: Entries of the vocabulary.
    """
    found = Files(config, {"finetune": whole}, {}, vocab_size, None).training(training_stage("finetune"), whole)
    return found.model_copy(update={"stage": "joint training"})
