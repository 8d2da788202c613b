from __future__ import annotations

import errno
import shutil

import torch.distributed as dist
from transformers import PreTrainedModel

from moedisco_ray.artifacts import disk_full
from moedisco_ray.training.job import TrainJob, World
from moedisco_ray.training.sharding import whole_state


def write_model(model: PreTrainedModel, job: TrainJob, world: World) -> None:
    """Write the trained weights as a Hugging Face directory under the family's classic names; every worker must call it.

    Raises:
        RunDirError: The disk is full.
    """
    state = whole_state(model)
    if world.rank == 0:
        draft = job.output.with_name(f".{job.output.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        try:
            draft.mkdir(parents=True)
            model.save_pretrained(draft, state_dict=state)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise disk_full(job.output) from error
            raise
        shutil.rmtree(job.output, ignore_errors=True)
        draft.rename(job.output)
    if world.size > 1:
        dist.barrier()
