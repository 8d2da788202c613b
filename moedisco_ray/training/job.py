"""The input and output of one training: plain values that travel between processes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from moedisco_ray.core.config import Lora, Optimizer, Outer, Residence
from moedisco_ray.core.store.locations import Location
from moedisco_ray.core.store.manifests import RESULT
from moedisco_ray.core.store.run_store import SHARED, RunStore
from moedisco_ray.core.store.run_work import unpickled
from moedisco_ray.models import BACKBONE
from moedisco_ray.plan.memory import Exchange
from moedisco_ray.policies.checkpointing import ASSUMED
from moedisco_ray.policies.parallel import Layout, Sharing
from moedisco_ray.policies.retrying import Skip
from moedisco_ray.policies.sync_points import Scope


class HeldOut(Protocol):
    """Held-out text to measure the loss on during training; sent to workers as part of a job."""

    @property
    def every(self) -> int:
        """Steps between two evaluations; there is always one after the last step."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the text."""

    def batches(self, batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets [B, L]; a target of -100 is ignored.

        Args:
            batch_tokens: Maximum positions (B x L) of a batch; a sequence with more positions is a batch of its own.
        """


@dataclasses.dataclass(frozen=True)
class DataShare:
    """The part of a shared data order that one of several trainings takes; together they take each batch once.

    Attributes:
        member: Number of the training, counted from 0.
        members: Number of trainings that share the order.
        batches: Number of batches that all of them take together; None if each takes equally many.
    """

    member: int = 0
    members: int = 1
    batches: int | None = None

    def batch(self, number: int) -> int:
        """Position of a batch in the data order that all members share; `number` counts this training's own batches."""
        return number * self.members + self.member

    def taken(self, steps: int) -> int:
        """Number of batches that all members have taken once each has made `steps` steps or its last one."""
        return min(steps * self.members, steps * self.members if self.batches is None else self.batches)


@dataclasses.dataclass(frozen=True)
class SyncPlan:
    """When, where and what a training exchanges with the other members of its group; see `training.sync`.

    Attributes:
        directory: Directory of the sync points, which all members share.
        steps: Completed steps at each sync point, ascending, without 0. If the last one is the job's last step, all
            members end with the same model.
        outer: Settings of the outer optimizer step.
        patience: Seconds to wait for late members once half of the members are ready; None means to wait for all
            members.
        max_wait: Maximum seconds that a member waits for the others. After that its training stops unfinished, to be
            resumed later.
        scope: Weights that the members exchange.
        ranges: Number of equal ranges into which the weights are divided to be combined; usually one per member.
        bits: Bits per weight that members exchange; None means that they exchange the weights themselves.
        store: Store of the run that `directory` belongs to.
    """

    directory: Path
    steps: tuple[int, ...]
    outer: Outer
    patience: float | None = None
    max_wait: float = math.inf
    scope: Scope = "backbone"
    ranges: int = 1
    bits: Literal[4] | None = None
    store: RunStore = dataclasses.field(default=SHARED, compare=False)


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """One model to train.

    Attributes:
        stage: Pipeline stage that the training belongs to.
        name: Unit name in events, such as `submodel-3`.
        model: Hugging Face model directory to start from.
        packed_dirs: Directories of packed tokens, read as one stream.
        output: Hugging Face model directory to write; it appears only when it is complete.
        checkpoints: Directory or URI for the checkpoints of this job alone. The job resumes from the newest one there.
        steps: Optimizer steps.
        sequence_length: Tokens per sequence.
        optimizer: Settings of the optimizer.
        lora: Rank and scale of the adapters that are trained instead of the weights; None: the weights are trained.
        deterministic: Whether a GPU computes the same bits each time.
        span: Part of the run's tokens, from 0 to 1, that the training covers, for a learning rate that follows the run.
        checkpoint_every: Steps between checkpoints. If it is None, `policies.checkpointing` chooses the interval with
            the least expected cost.
        keep: Number of checkpoints to keep.
        seed: Seed of the data order and of stochastic rounding.
        load_balance: Weight of the load-balance loss.
        z_loss: Weight of the router z-loss.
        log_every: Steps between progress events.
        skip: Batches to leave out; None if none is left out.
        share: The job's part of the data order that `seed` gives.
        logs: Directory of the workers' logs, `NAME.RANK.log`; None if they write no logs.
        sync: Sync points with other trainings; None if there are none.
        losses_per_hour: Expected worker losses per worker-hour when the job starts; see
            `policies.checkpointing.loss_rate`.
        held_out: Text on which the loss is evaluated during training; None if it is not evaluated.
        optimizer_state: Directory of the optimizer state to start with; None to start with an empty state.
        sharing: How the workers share the model; None: its weights are sharded among all of them.
        exchange: How often the workers exchange weights and gradients; see `sharding.Exchanges`.
        memory: Where weights and optimizer state are: on the device, or in the host's memory, from which one layer at a
            time comes to the device.
        with_optimizer_state: Whether to write the final optimizer state into the output directory.
        drop_checkpoints: Whether to delete the checkpoints as soon as the output is complete; a record of the result
            replaces them.
        store: Store of the run. A job that is sent to another machine gets the paths of that machine.
        owner: Data owner of the text; None: the text has no owner.
        owner_store: The owner's storage, which holds packed tokens, checkpoints and logs. Only the owner's nodes use
            it.
    """

    stage: str
    name: str
    model: Path
    packed_dirs: tuple[Path, ...]
    output: Path
    checkpoints: Location
    steps: int
    sequence_length: int
    optimizer: Optimizer
    checkpoint_every: int | None
    keep: int = 2
    lora: Lora | None = None
    deterministic: bool = False
    span: tuple[float, float] = (0.0, 1.0)
    seed: int = 0
    load_balance: float = 0.0
    z_loss: float = 0.0
    log_every: int = 10
    skip: Skip | None = None
    share: DataShare = DataShare()
    logs: Path | None = None
    sync: SyncPlan | None = None
    losses_per_hour: float = ASSUMED.per_hour
    held_out: HeldOut | None = None
    optimizer_state: Path | None = None
    exchange: Exchange = "step"
    memory: Residence = "resident"
    sharing: Sharing | None = None
    with_optimizer_state: bool = False
    drop_checkpoints: bool = False
    store: RunStore = dataclasses.field(default=SHARED, compare=False)
    owner: str | None = None
    owner_store: RunStore = dataclasses.field(default=SHARED, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return _job_of, (type(self), self.store.dumps(fields, self.owner_store))

    @contextlib.contextmanager
    def using_files(self) -> Iterator[None]:
        """Fetch the files in `reads` to this machine, and keep them on its disk until the `with` block ends."""
        with self.store.using(*self.reads), self.owner_store.using(*self.packed_dirs):
            yield

    @property
    def reads(self) -> tuple[Path, ...]:
        """Files and directories that every worker reads."""
        text = () if self.held_out is None else self.held_out.files
        state = () if self.optimizer_state is None else (self.optimizer_state,)
        return (self.model, self.model.parent / BACKBONE, *self.packed_dirs, self.key_file, *state, *text)

    @property
    def result_file(self) -> Path:
        """File with the result of a finished training whose checkpoints are deleted."""
        return self.output.parent / RESULT

    @property
    def key_file(self) -> Path:
        """File of the key that signs the checkpoints: in the run directory, wherever the checkpoints are stored."""
        return self.output.parent / "checkpoints.key"

    @property
    def batch(self) -> int:
        """Sequences per step over all workers."""
        return max(1, self.optimizer.batch_tokens // self.sequence_length)

    @property
    def step_tokens(self) -> int:
        """Tokens per step over all workers."""
        return self.batch * self.sequence_length


def _job_of(kind: type[TrainJob], data: bytes) -> TrainJob:
    return kind(**unpickled(data))


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The outcome of a training.

    Attributes:
        steps: Steps completed, including those before a restart; fewer than the job asks for if training was stopped.
        tokens: Tokens trained on.
        losses: Mean cross-entropy of each step's global batch, in nats per token that the loss counts, without the
            router losses.
        seconds: Wall-clock time of the loop in seconds, including earlier attempts up to their last checkpoint.
        restored_step: Step of the checkpoint that training resumed from; 0 if it started from the beginning.
        finished: Whether training ended and the model is written.
        waits_for_sync: Whether training is unfinished because other members have not reached the sync point.
    """

    steps: int
    tokens: int
    losses: tuple[float, ...]
    seconds: float
    restored_step: int
    finished: bool
    waits_for_sync: bool = False

    @property
    def loss(self) -> float:
        """Mean loss of the last twentieth of the steps, at least one; NaN without steps."""
        last = self.losses[-max(1, len(self.losses) // 20) :]
        return sum(last) / len(last) if last else float("nan")


@dataclasses.dataclass(frozen=True)
class World:
    """This process among the workers of one training.

    Attributes:
        rank: Rank of this worker, from 0.
        size: Number of workers; above 1, torch.distributed is initialised.
        device: Torch device to compute on, such as `cuda:0`.
        devices: All devices that this worker computes on, `device` first; empty if it is the only one.
        layout: How the workers share the model; None: all its weights are sharded among all of them.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    devices: tuple[str, ...] = ()
    layout: Layout | None = None

    @property
    def all_devices(self) -> tuple[str, ...]:
        """The devices that this worker computes on."""
        return self.devices or (self.device,)

    @property
    def slots(self) -> int:
        """Number of slots that the training holds."""
        return self.size * len(self.all_devices)

    @property
    def shard(self) -> int:
        """Number of this worker within its replica of the model; replicas round alike."""
        return self.rank if self.layout is None else self.rank % self.layout.shards


def devices_of(device: str, slots: int) -> tuple[str, ...]:
    """All devices of a worker that holds a number of slots, as `World.devices`.

    Args:
        device: The first of them; without GPUs, they are threads of one CPU.
        slots: Number of slots.
    """
    if slots == 1:
        return ()
    return tuple(f"cuda:{number}" for number in range(slots)) if device.startswith("cuda") else (device,) * slots
