"""The micro-batches of a worker in a step, with equal shapes on every worker.

A thread reads the sequences of the next step while the present step is computed, because a run at a URI makes a request
for each of them.

Axes: B sequences of a micro-batch, L positions, n sequences of this worker's part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moedisco_ray.core.errors import CorpusError
from moedisco_ray.packed_tokens import TokenStream, batch_indices
from moedisco_ray.training.job import TrainJob, World


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """The sequences of one forward pass.

    Attributes:
        inputs_BL: Token ids.
        targets_BL: Token that follows each position; -100 in a padding sequence, and for tokens that the loss does not
            count.
        loss_tokens: Number of targets that the loss counts in the global batch, at least 1.
        weights_BL: Weight of each token in the routers' statistics: 0 for padding; together they are as much as the
            tokens of a step. None means that all weights are 1.
        positions_BL: Position of each token in its document. If the document began in an earlier sequence, positions
            are counted from the start of this sequence. None means that positions are those in the sequence, and that
            tokens attend across documents.
        bounds_N: Bounds of its documents (`models.attention.bounds_for`), if they are known already.
    """

    inputs_BL: Tensor
    targets_BL: Tensor
    loss_tokens: int
    weights_BL: Tensor | None
    positions_BL: Tensor | None = None
    bounds_N: Tensor | None = None

    @property
    def weights_T(self) -> Tensor | None:
        """`weights_BL` in one row; T = B L."""
        return None if self.weights_BL is None else self.weights_BL.flatten()


@dataclasses.dataclass(frozen=True)
class _Sequences:
    """What a worker reads for a step, in this machine's memory.

    Attributes:
        tokens_nW: Token ids of the windows, W = L + 1, and zeros of padding sequences.
        filled_n: Number of tokens of each sequence that are not padding.
        weight: Weight of each of them.
        counts_nL: The targets that the loss counts; None if it counts all.
        starts_nL: The inputs at which documents begin; None if tokens attend across documents.
        loss_tokens: Number of targets that the loss counts in the global batch, at least 1.
    """

    tokens_nW: Tensor
    filled_n: Tensor
    weight: float
    counts_nL: Tensor | None
    starts_nL: Tensor | None
    loss_tokens: int


class Batches:
    """This worker's part of every global batch.

    The global batch of a step depends on seed, share and step alone; worker r takes its r-th contiguous part. All parts
    are padded to the size of the largest with sequences of weight 0, because every forward pass of a sharded model
    needs all workers.

    The next step is read ahead, so the `with` block waits at its end until no file is read any more. An error of
    reading is raised in the step that needs what could not be read: the steps before it are made, and are in the
    checkpoint of a training that stops.

    Raises:
        CorpusError: The packed tokens are shorter than one sequence, or tokens are to attend within documents, and an
            earlier release packed them without the beginnings of documents.
    """

    def __init__(self, job: TrainJob, world: World) -> None:
        self._stream = TokenStream(job.packed_dirs, job.sequence_length)
        if job.optimizer.within_documents and (unknown := self._stream.without_starts) is not None:
            raise CorpusError(
                "optimizer.within_documents",
                None,
                f"needs the beginnings of documents, which an earlier release did not store in {unknown.parent}; "
                "remove the folders corpus and clusters of the run and run again, or set it to false",
            )
        self._job = job
        self._world = world
        share = -(-job.batch // world.size)
        self._start = min(world.rank * share, job.batch)
        self._stop = min(self._start + share, job.batch)
        self._share = share
        self._micro_batch = min(job.optimizer.micro_batch or share, share)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: dict[int, Future[_Sequences]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reader.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> Iterator[MicroBatch]:
        """The micro-batches of a step; steps are counted from 0."""
        device = self._world.device
        read = self._sequences(step)
        # Nothing waits for a copy from pinned memory: it takes its turn among the kernels of the GPU.
        tokens = read.tokens_nW.to(device, non_blocking=True)
        counts_nL = None if read.counts_nL is None else read.counts_nL.to(device, non_blocking=True)
        starts_nL = None if read.starts_nL is None else read.starts_nL.to(device, non_blocking=True)
        length = self._job.sequence_length
        for start in range(0, self._share, self._micro_batch):
            rows = slice(start, min(start + self._micro_batch, self._share))
            targets_BL, weights_BL, filled_B = tokens[rows, 1:], None, read.filled_n[rows]
            if read.weight != 1 or bool((filled_B < length).any()):
                real_BL = torch.arange(length, device=device) < filled_B.to(device)[:, None]
                targets_BL, weights_BL = targets_BL.masked_fill(~real_BL, -100), real_BL * read.weight
            if counts_nL is not None:
                targets_BL = targets_BL.masked_fill(~counts_nL[rows], -100)
            positions_BL = None if starts_nL is None else document_positions(starts_nL[rows])
            yield MicroBatch(tokens[rows, :-1], targets_BL, read.loss_tokens, weights_BL, positions_BL)

    def _sequences(self, step: int) -> _Sequences:
        ahead = self._ahead.pop(step, None) or self._reader.submit(self._read, step)
        self._ahead.clear()
        if step + 1 < self._job.steps:
            self._ahead[step + 1] = self._reader.submit(self._read, step + 1)
        return ahead.result()

    def _read(self, step: int) -> _Sequences:
        number = self._job.share.batch(step if self._job.skip is None else self._job.skip.batch(step))
        batch = batch_indices(self._job.seed, number, self._job.batch, len(self._stream))
        order = batch[self._start : self._stop].tolist()
        length, shape = self._job.sequence_length, (self._share, self._job.sequence_length)
        windows = np.zeros((self._share, length + 1), dtype=np.int64)
        filled, starts = np.zeros(self._share, dtype=np.int64), np.zeros(shape, dtype=np.bool_)
        for row, index in enumerate(order):
            windows[row], filled[row] = self._stream.window(index), min(length, self._stream.filled(index))
            if self._job.optimizer.within_documents:
                starts[row] = self._stream.document_starts(index)
        counts_nL, loss_tokens = self._counts(batch)
        tokens_nW = torch.from_numpy(windows)
        starts_nL = torch.from_numpy(starts) if self._job.optimizer.within_documents else None
        if self._world.device != "cpu":
            tokens_nW = tokens_nW.pin_memory()
            counts_nL, starts_nL = (None if each is None else each.pin_memory() for each in (counts_nL, starts_nL))
        real = sum(min(length, self._stream.filled(index)) for index in batch.tolist())
        return _Sequences(
            tokens_nW,
            torch.from_numpy(filled),
            weight=self._job.step_tokens / real,
            counts_nL=counts_nL,
            starts_nL=starts_nL,
            loss_tokens=loss_tokens,
        )

    def _counts(self, batch: NDArray[np.int64]) -> tuple[Tensor | None, int]:
        """The targets of this worker's n sequences that the loss counts, and their number in the global batch.

        Every worker reads the masks of the whole batch: they are small, and the number is then known without
        communication.
        """
        if not self._stream.masked:
            return None, self._job.step_tokens
        masks = [self._stream.loss_mask(int(index)) for index in batch]
        counts = np.zeros((self._share, self._job.sequence_length), dtype=np.bool_)
        for row, mask in enumerate(masks[self._start : self._stop]):
            counts[row] = mask
        return torch.from_numpy(counts), max(1, sum(int(mask.sum()) for mask in masks))


def document_positions(starts_BL: Tensor) -> Tensor:
    """Position of each token in its document, or in the sequence if the document began in an earlier one.

    Args:
        starts_BL: Whether a document begins at each token.
    """
    order_L = torch.arange(starts_BL.shape[1], device=starts_BL.device)
    return order_L - torch.where(starts_BL, order_L, 0).cummax(dim=1).values
