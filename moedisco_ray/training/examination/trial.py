"""Train a model of random weights for a few steps: the memory that it takes, and its speed."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moedisco_ray.core.cards import peak_flops
from moedisco_ray.core.config import Architecture, FamilyName, Optimizer, TrainingStageName
from moedisco_ray.core.records.measurements import MemoryTrial, SpeedTrial
from moedisco_ray.models import hf_config
from moedisco_ray.models.attention import attend_within_documents
from moedisco_ray.plan.cost import flops_per_token
from moedisco_ray.plan.memory import Memory, micro_batch_sequences, worker_sequences
from moedisco_ray.plan.parameters import count_parameters
from moedisco_ray.training.batches import MicroBatch
from moedisco_ray.training.job import TrainJob, World
from moedisco_ray.training.sharding import compute_dtype, configured
from moedisco_ray.training.stepper import ResidentStepper

SPEED_LAYERS = 2
_DOCUMENT = 300
"""Tokens of a document, if documents do not see each other."""
_MOST_PARTS = 8
"""Micro-batches of a step whose speed is measured; more would hide the optimizer's step even better."""
_LEAST_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Trial:
    """A training to try.

    Attributes:
        stage: The stage whose settings it has.
        family: The model's family.
        architecture: Sizes of the model.
        vocab_size: Rows of the embedding.
        sequence_length: Tokens per sequence.
        optimizer: The planned settings.
        planned: The planned memory.
        routes: Whether the router's losses are computed.
    """

    stage: TrainingStageName
    family: FamilyName
    architecture: Architecture
    vocab_size: int
    sequence_length: int
    optimizer: Optimizer
    planned: Memory
    routes: bool

    @property
    def micro_batch(self) -> int:
        """Sequences of one forward pass."""
        return micro_batch_sequences(self.optimizer, self.sequence_length, 1)

    @property
    def batch(self) -> int:
        """Sequences of a step."""
        return worker_sequences(self.optimizer, self.sequence_length, 1)


class Steps:
    """Steps of a training with random weights on a device."""

    def __init__(self, trial: Trial, device: str) -> None:
        # Compilation takes longer than the trial.
        optimizer = trial.optimizer.model_copy(update={"compile": False})
        self._trial, self._device = trial, device
        self._documents = optimizer.within_documents
        job = TrainJob(
            stage=trial.stage,
            name="trial",
            model=Path(),
            packed_dirs=(),
            output=Path(),
            checkpoints=Path(),
            steps=1,
            sequence_length=trial.sequence_length,
            optimizer=optimizer,
            checkpoint_every=None,
            load_balance=0.01 if trial.routes else 0.0,
            z_loss=0.001 if trial.routes else 0.0,
        )
        with torch.device(device):
            config = hf_config(trial.family, trial.architecture, trial.vocab_size, trial.sequence_length, 0)
            dtype = torch.bfloat16 if optimizer.state == "bf16" else torch.float32
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if self._documents:
            attend_within_documents(model, device, compute_dtype(optimizer, device))
        self._step = ResidentStepper(configured(model, optimizer), job, World(device=device))

    def __call__(self, sizes: list[int]) -> None:
        """Make a step of micro-batches with these numbers of sequences, and wait until it is done."""
        tokens = sum(sizes) * self._trial.sequence_length
        self._step(self._micro_batch(size, tokens) for size in sizes)
        if torch.device(self._device).type == "cuda":
            torch.cuda.synchronize(self._device)

    def _micro_batch(self, sequences: int, tokens: int) -> MicroBatch:
        length = self._trial.sequence_length
        ids_BL = torch.arange(sequences * length, device=self._device).view(sequences, length) % self._trial.vocab_size
        positions_BL: Tensor | None = None
        if self._documents:
            positions_BL = (torch.arange(length, device=self._device) % _DOCUMENT).expand(sequences, -1)
        return MicroBatch(ids_BL, ids_BL, tokens, None, positions_BL)


def try_memory(trial: Trial, device: str, seconds: float) -> MemoryTrial:
    """Make two steps with the planned settings, then try micro-batches of 1, 2, 4, ... sequences.

    Two micro-batches per step show the planned peak, whatever their number in a training.

    Args:
        trial: The training.
        device: torch's name of the device.
        seconds: Time after which no larger micro-batch is tried (s).

    Raises:
        MemoryError: The planned settings do not fit.
    """
    began = time.monotonic()
    planned = [trial.micro_batch] * min(2, -(-trial.batch // trial.micro_batch))
    with _peak(device) as peak:
        steps = Steps(trial, device)
        for _ in range(2):
            with out_of_memory():
                steps(planned)

    def fits(size: int) -> bool:
        if time.monotonic() - began > seconds:
            return False
        with contextlib.suppress(MemoryError), out_of_memory():
            steps([size])
            return True
        return False

    largest = largest_power(fits, trial.batch)
    return MemoryTrial(
        stage=trial.stage,
        planned_bytes=trial.planned.total - trial.planned.overhead,
        peak_bytes=peak(),
        micro_batch=trial.micro_batch,
        largest_micro_batch=largest,
    )


def largest_power(fits: Callable[[int], bool], most: int) -> int | None:
    """The largest of 1, 2, 4, ..., at most `most`, up to which all fit; None if not even 1 does."""
    size = 1
    while size <= most and fits(size):
        size *= 2
    return size // 2 or None


def try_speed(trial: Trial, device: str, seconds: float) -> SpeedTrial:
    """Measure the speed of training the first layers of a model, without compilation.

    Args:
        trial: The training.
        device: torch's name of the device.
        seconds: Time for the steps (s); at least three are made.

    Raises:
        MemoryError: The planned settings do not fit.
    """
    layers = min(SPEED_LAYERS, trial.architecture.num_hidden_layers)
    shape = trial.architecture.model_copy(update={"num_hidden_layers": layers})
    steps = Steps(dataclasses.replace(trial, architecture=shape), device)
    parts = [trial.micro_batch] * min(_MOST_PARTS, -(-trial.batch // trial.micro_batch))
    with out_of_memory():
        steps(parts)  # the first step also allocates memory and chooses kernels, so it is not timed
        taken = list[float]()
        while len(taken) < _LEAST_STEPS or sum(taken) < seconds:
            began = time.perf_counter()
            steps(parts)
            taken.append(time.perf_counter() - began)
    rate = sum(parts) * trial.sequence_length / statistics.median(taken)
    parameters = count_parameters(trial.family, shape, trial.vocab_size)
    flops = rate * flops_per_token(parameters, shape, trial.sequence_length, checkpointing=False)
    peak = peak_flops(torch.cuda.get_device_name(device)) if torch.device(device).type == "cuda" else None
    return SpeedTrial(
        stage=trial.stage,
        experts=shape.num_experts,
        tokens_per_second=rate,
        flops_per_second=flops,
        mfu=None if peak is None else flops / peak,
    )


@contextlib.contextmanager
def out_of_memory() -> Iterator[None]:
    """Turn torch's errors about memory into MemoryError, and free what the failed operation has allocated.

    Raises:
        MemoryError: The device has too little memory.
    """
    try:
        yield
    except RuntimeError as error:  # on a CPU, torch has no class of its own for it
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        reason = str(error).partition("\n")[0]
    else:
        return
    gc.collect()
    torch.cuda.empty_cache()  # nothing without a card
    raise MemoryError(reason)


@contextlib.contextmanager
def _peak(device: str) -> Iterator[Callable[[], int]]:
    """Measure the largest memory that the block takes: a card's allocations, or this process' resident memory.

    Yields:
        A function that returns the bytes, after the block.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        measured: list[int] = []
        yield lambda: measured[0]
        measured.append(torch.cuda.max_memory_allocated(device) - before)
        return
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # restart the kernel's record of the peak
    found: list[int] = []
    yield lambda: found[0]
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found.append(1024 * int(status.partition("VmHWM:")[2].split()[0]) - before)
