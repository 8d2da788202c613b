"""Looks at the held-out loss while a model is trained. They change nothing of the training but its wall-clock time."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from moedisco_ray.core.events import Emit, Event
from moedisco_ray.training.job import HeldOut, TrainJob, World
from moedisco_ray.training.sharding import autocast


class HeldOutLoss:
    """Emits an `evaluation` event whenever one is due.

    Every worker runs all of the text, because a sharded model's forward pass takes all of them.

    Args:
        job: What is trained; without `held_out` nothing is ever due.
        model: The model as it is trained.
        world: This process.
        emit: Receives the events, on rank 0.
    """

    def __init__(self, job: TrainJob, model: PreTrainedModel, world: World, emit: Emit) -> None:
        self._job = job
        self._model = model
        self._world = world
        self._emit = emit

    def __call__(self, step: int, *, last: bool) -> None:
        """Look, if it is time to, after so many steps, and after the last one."""
        held_out = self._job.held_out
        if held_out is None or (step % held_out.every and not last):
            return
        loss = self._loss(held_out)
        if self._world.rank == 0:
            self._emit(Event("evaluation", self._job.stage, self._job.name, {
                "step": step, "tokens": step * self._job.step_tokens, "held_out_loss": loss}))

    @torch.no_grad()
    def _loss(self, held_out: HeldOut) -> float:
        """Mean over the text's tokens, in nats."""
        share = -(-self._job.batch // self._world.size)
        sequences = min(self._job.optimizer.micro_batch or share, share)    # what training itself has the memory for
        nats, tokens = torch.zeros((), dtype=torch.float64, device=self._world.device), 0
        self._model.eval()
        for inputs_BL, targets_BL in held_out.batches(sequences * self._job.sequence_length):
            with autocast(self._job.optimizer, self._world):
                logits_BLV = self._model(input_ids=inputs_BL.to(self._world.device), use_cache=False).logits
            targets_T = targets_BL.flatten().to(self._world.device)
            nats += cross_entropy(logits_BLV.flatten(0, 1).float(), targets_T, reduction="sum").double()
            tokens += int((targets_BL != -100).sum())
        self._model.train()
        return nats.item() / tokens
