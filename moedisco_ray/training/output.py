from __future__ import annotations

import shutil

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from moedisco_ray.core.artifacts import reporting_full_disk
from moedisco_ray.core.errors import RunDirError
from moedisco_ray.models import ModelMap, canonical_state, save_model
from moedisco_ray.models.optimizer_state import FOLDER
from moedisco_ray.training.job import TrainJob, World
from moedisco_ray.training.optimizer_state import lay_down
from moedisco_ray.training.sharding import whole_state


def write_model(model: PreTrainedModel, optimizer: torch.optim.Optimizer, job: TrainJob, world: World) -> None:
    """Write the trained weights as a Hugging Face directory under classic names; every worker must call it.

    Args:
        model: As it was trained.
        optimizer: Its moments are laid beside the weights, if the job says so.
        job: Says where to.
        world: This process.

    Raises:
        RunDirError: The disk is full.
    """
    state = whole_state(model)
    draft = job.output.with_name(f".{job.output.name}.draft")
    try:
        with reporting_full_disk(job.output):
            if world.rank == 0:
                shutil.rmtree(draft, ignore_errors=True)
                # A head that is the embedding is not written twice.
                if model.config.tie_word_embeddings:
                    state.pop("lm_head.weight", None)
                save_model(model, draft, canonical_state(state, ModelMap(str(model.config.model_type))).items())
            if job.leave_moments:
                lay_down(model, optimizer, draft / FOLDER, world)
    except (OSError, RunDirError):
        shutil.rmtree(draft, ignore_errors=True)
        raise
    if world.rank == 0:
        shutil.rmtree(job.output, ignore_errors=True)
        draft.rename(job.output)
    if world.size > 1:
        dist.barrier()
