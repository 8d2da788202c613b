"""The one training loop: of the seed model, the sub-models, and the merged Mixture-of-Experts.

A step's global batch depends on (seed, step) alone, and every loss is a sum over its tokens: so the result is the same
for any number of workers and any micro-batch up to rounding, and the same bit for bit when a run is interrupted and
resumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from moedisco_ray.core.events import Emit
from moedisco_ray.training import objective
from moedisco_ray.training.batches import Batches, MicroBatch
from moedisco_ray.training.checkpoints.checkpoint import Progress
from moedisco_ray.training.checkpoints.saver import Saver
from moedisco_ray.training.consensus import Consensus
from moedisco_ray.training.held_out import HeldOutLoss
from moedisco_ray.training.job import TrainJob, TrainResult, World
from moedisco_ray.training.metrics import TrainingMetrics
from moedisco_ray.training.optimizer import LARGEST_NORM, make_optimizer, set_rate
from moedisco_ray.training.optimizer_state import take_up
from moedisco_ray.training.output import write_model
from moedisco_ray.training.schedule import learning_rate
from moedisco_ray.training.sharding import autocast, trainable
from moedisco_ray.training.sync.member import SyncMember

_LOOK_SECONDS = 0.2
"""Between two looks for the others of a round."""


def _unheard(step: int) -> None:
    """Nobody asks which step begins."""


def train(
    job: TrainJob, world: World, emit: Emit, stop: Callable[[], bool], begins: Callable[[int], None] = _unheard,
    losses_per_hour: Callable[[], float] | None = None,
) -> TrainResult:
    """All of `training`, waiting wherever it waits."""
    work = training(job, world, emit, stop, begins, losses_per_hour)
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: TrainResult = end.value
            return result
        time.sleep(_LOOK_SECONDS)


def training(
    job: TrainJob, world: World, emit: Emit, stop: Callable[[], bool], begins: Callable[[int], None] = _unheard,
    losses_per_hour: Callable[[], float] | None = None,
) -> Generator[None, None, TrainResult]:
    """Train, from the newest checkpoint if there is one, and write the model; every worker of a training calls this.

    Args:
        job: What to train, and where its files lie.
        world: This process among the workers.
        emit: Receives `progress` and `evaluation` events, on rank 0.
        stop: Asked after steps; once it is true on any worker, all save a checkpoint and return an unfinished result.
        begins: Told of each step, counted from 0, before it is made.
        losses_per_hour: What is known of a worker's losses by now; None: no more than the job says.

    Yields:
        Whenever it waits for the others of its round; without rounds never.

    Raises:
        NotFiniteError: A loss or a gradient is not finite.
        CheckpointError: The moments to begin with are another model's.
        CorpusError: The shards are shorter than one sequence.
        RunDirError: The disk is full.
        StorageError: The checkpoints' storage does not answer, or the newest checkpoint is damaged.
    """
    model = trainable(job.model, job.optimizer, world)
    stepper = Stepper(model, job, world)
    with Saver(job, model, stepper.optimizer, world, emit, losses_per_hour) as saver:
        batches = Batches(job, world)
        progress = saver.restore()
        if job.moments is not None and not saver.newest:
            take_up(job.moments, model, stepper.optimizer, world)
        stepper.restore(progress.fractions_NE)
        restored = progress.step
        ledger = TrainingMetrics(job, world, emit, progress)
        held_out = HeldOutLoss(job, model, world, emit)
        meeting = SyncMember(job, model, ledger, world)
        agree = Consensus((stop, saver.wanted), world)

        def progress_now() -> Progress:
            progress.fractions_NE = stepper.fractions_NE.tolist()
            return progress

        stopped = waits = False
        for step in range(restored, job.steps):
            begins(step)
            if not (yield from meeting.attend(step, stop, lambda: saver.secure(progress_now()))):
                stopped = waits = True
                break
            lr = learning_rate(step, job.steps, job.optimizer)
            set_rate(stepper.optimizer, lr)
            ledger.add(*stepper(batches(step)))
            done = step + 1
            log = done % job.log_every == 0
            if log:
                ledger.settle()
            last = done == job.steps
            stopped, wanted = (False, False) if last else agree()
            if last or stopped or wanted or saver.scheduled(done):
                ledger.settle()
                saver.save(progress_now())
            if log or last or stopped:
                ledger.log(lr)
            held_out(done, last=last)
            if stopped or last:
                break
        if not stopped:
            write_model(model, stepper.optimizer, job, world)
    return TrainResult(
        progress.step, progress.tokens, tuple(progress.losses), progress.seconds, restored, finished=not stopped,
        waits=waits)


class Stepper:
    """One optimizer step after another.

    Args:
        model: Ready to train.
        job: Its recipe and the weights of the router losses.
        world: This process.

    Attributes:
        optimizer: Of the model's trained parameters.
        fractions_NE: Selections per token of each expert in the last global batch, one row per router.
    """

    def __init__(self, model: PreTrainedModel, job: TrainJob, world: World) -> None:
        self._model = model
        self._job = job
        self._world = world
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(model, job, world)
        probe = objective.RouterProbe(model) if job.load_balance or job.z_loss else None
        self._probe = probe if probe is not None and probe.layers else None
        self.fractions_NE = torch.zeros(0, 0)
        if self._probe is not None:
            uniform_NE = objective.uniform_fractions(self._probe.layers, self._probe.experts, self._probe.top_k)
            self.fractions_NE = uniform_NE.to(world.device)
        self._selections_NE = torch.zeros_like(self.fractions_NE)

    def restore(self, fractions_NE: list[list[float]]) -> None:
        """Take the selections of the batch before a checkpoint."""
        if self._probe is not None and fractions_NE:
            self.fractions_NE = torch.tensor(fractions_NE, device=self._world.device)

    def __call__(self, micro_batches: Iterable[MicroBatch]) -> tuple[Tensor, Tensor]:
        """Make a step, at the learning rate that the optimizer's groups have.

        Args:
            micro_batches: This worker's part of the global batch.

        Returns:
            Cross-entropy summed over this worker's tokens, and the norm of the whole gradient before it was clipped.
        """
        self._selections_NE.zero_()
        losses = [self._backward(micro) for micro in micro_batches]
        norm = _whole(torch.nn.utils.clip_grad_norm_(self._parameters, LARGEST_NORM))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._probe is not None:
            if self._world.size > 1:
                dist.all_reduce(self._selections_NE)
            self.fractions_NE = self._selections_NE / self._job.step_tokens
        return torch.stack(losses).sum(), norm

    def _backward(self, micro: MicroBatch) -> Tensor:
        tokens = self._job.step_tokens
        if self._probe is None:
            loss_sum = self._forward(micro)
            torch.autograd.backward(loss_sum / tokens)
            return loss_sum.detach()
        with self._probe.recording(micro.weights_T):
            loss_sum = self._forward(micro)
        sums = self._probe.sums()
        self._selections_NE += sums.selections_NE
        balance = objective.load_balance_loss(sums.probabilities_NE, self.fractions_NE, tokens)
        z = objective.z_loss(sums.log_partition_N, tokens)
        torch.autograd.backward(loss_sum / tokens + self._job.load_balance * balance + self._job.z_loss * z)
        return loss_sum.detach()

    def _forward(self, micro: MicroBatch) -> Tensor:
        with autocast(self._job.optimizer, self._world):
            logits_BLV = self._model(input_ids=micro.inputs_BL, use_cache=False).logits
        return objective.token_loss(logits_BLV, micro.targets_BL, micro.weights_B)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
