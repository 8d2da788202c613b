"""What one run of the training loop is given, and what it gives back: plain values that travel between processes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from torch import Tensor

from moedisco_ray.core.config import Optimizer, Outer
from moedisco_ray.core.locations import Location
from moedisco_ray.policies.checkpointing import ASSUMED
from moedisco_ray.policies.retrying import Skip


class HeldOut(Protocol):
    """Held-out text; a plain value that travels with a job."""

    @property
    def every(self) -> int:
        """Steps between two looks; there is one after the last step too."""

    def batches(self, batch_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets [B, L] of at most `batch_tokens` positions, unless one sequence is longer; -100 is no target."""


@dataclasses.dataclass(frozen=True)
class Rounds:
    """When a training exchanges its backbone with others, and where; see `training.rounds`.

    Attributes:
        directory: Common to all members.
        at: The steps after which it meets the others, ascending, none of them 0 or the last.
        outer: The outer step.
        patience: See `policies.rounds.gather`.
        stay: Seconds that it waits for the others before it ends unfinished, to go on later.
    """

    directory: Path
    at: tuple[int, ...]
    outer: Outer
    patience: float | None = None
    stay: float = math.inf


@dataclasses.dataclass(frozen=True)
class TrainJob:
    """One model to train.

    Attributes:
        stage: The pipeline's stage it belongs to.
        name: Its unit in events, such as `submodel-3`.
        model: Hugging Face model directory to start from.
        shards: Directories of packed tokens.
        output: Hugging Face model directory to make; appears when complete.
        checkpoints: Directory or URI for this job's checkpoints alone. A job that finds one there goes on from it.
        steps: Optimizer steps.
        sequence_length: Tokens per sequence.
        optimizer: The recipe.
        checkpoint_every: Steps between checkpoints; None: as often as costs least, by `policies.checkpointing`.
        keep: How many checkpoints to keep.
        seed: Of the order of the data, and of stochastic rounding.
        load_balance: Weight of the load-balance loss.
        z_loss: Weight of the router z-loss.
        log_every: Steps between progress events.
        skip: Batches to leave out; None: none.
        logs: Directory for its workers' logs, `NAME.RANK.log`; None: none are written.
        rounds: Meetings with other trainings; None: it has none.
        losses_per_hour: How often a worker is expected to be lost, as far as is known when it begins; see
            `policies.checkpointing.loss_rate`.
        held_out: Text on which the loss is looked at while it trains; None: none.
        moments: Directory of the moments that its optimizer begins with; None: it begins with none.
        leave_moments: Whether it leaves its own in the model's directory.
    """

    stage: str
    name: str
    model: Path
    shards: tuple[Path, ...]
    output: Path
    checkpoints: Location
    steps: int
    sequence_length: int
    optimizer: Optimizer
    checkpoint_every: int | None
    keep: int = 2
    seed: int = 0
    load_balance: float = 0.0
    z_loss: float = 0.0
    log_every: int = 10
    skip: Skip | None = None
    logs: Path | None = None
    rounds: Rounds | None = None
    losses_per_hour: float = ASSUMED.per_hour
    held_out: HeldOut | None = None
    moments: Path | None = None
    leave_moments: bool = False

    @property
    def key_file(self) -> Path:
        """The file of the key that signs its checkpoints: in the run directory, wherever the checkpoints are stored."""
        return self.output.parent / "checkpoints.key"

    @property
    def batch(self) -> int:
        """Sequences per step over all workers."""
        return max(1, self.optimizer.batch_tokens // self.sequence_length)

    @property
    def step_tokens(self) -> int:
        """Tokens per step over all workers."""
        return self.batch * self.sequence_length


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """A training's outcome.

    Attributes:
        steps: Steps made, those before a restart included; fewer than the job's when it was stopped.
        tokens: Tokens trained on.
        losses: Mean cross-entropy of each step's global batch, in nats per token, without the router losses.
        seconds: Wall-clock time of the loop, that of earlier attempts up to their checkpoint included.
        restored_step: The step of the checkpoint it went on from; 0: it began anew.
        finished: Whether it came to its end and wrote the model.
        waits: Unfinished, because the others of its round are not there yet.
    """

    steps: int
    tokens: int
    losses: tuple[float, ...]
    seconds: float
    restored_step: int
    finished: bool
    waits: bool = False

    @property
    def loss(self) -> float:
        """Mean loss of the last twentieth of the steps, at least one; NaN of no steps."""
        last = self.losses[-max(1, len(self.losses) // 20):]
        return sum(last) / len(last) if last else float("nan")


@dataclasses.dataclass(frozen=True)
class World:
    """This process among the workers of one training.

    Attributes:
        rank: Its number, from 0.
        size: How many there are; above 1, torch.distributed is initialised.
        device: Where it computes, as torch spells it.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"


def steps_for(tokens: int, optimizer: Optimizer) -> int:
    """Optimizer steps that a budget of tokens pays for, at least one."""
    return max(1, tokens // optimizer.batch_tokens)
