"""Trainings on conversations: each attends to itself alone, where the model's layers can."""

from __future__ import annotations

import dataclasses

from moedisco_ray.models import open_complete
from moedisco_ray.models.attention import carries_state
from moedisco_ray.packed_tokens import has_conversations
from moedisco_ray.training.job import TrainJob


def with_conversations_apart(job: TrainJob) -> TrainJob:
    """The job with `within_documents`, if some of its text is packed as whole conversations.

    Recurrent layers carry a state from one conversation of a window to the next, and keep it.
    """
    if job.optimizer.within_documents or not any(map(has_conversations, job.packed_dirs)):
        return job
    _, config = open_complete(job.model)
    if carries_state(config) is not None:
        return job
    return dataclasses.replace(job, optimizer=job.optimizer.model_copy(update={"within_documents": True}))
