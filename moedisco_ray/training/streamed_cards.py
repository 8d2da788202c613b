"""The cards of one machine that make a streamed step together, and what passes between them.

Each card has every c-th layer, and a thread that asks for its work. A micro-batch goes from card to card: while one
card computes it in its layer, the card before computes the next micro-batch. Hidden states and their gradients pass
through the host's memory, where the backward pass finds the inputs of its layers anyway, so cards need no link of their
own. Each weight crosses to a card once per pass, whatever the number of cards, and its gradient is added up on one card
in the order of the micro-batches, as with one card.

Letters: c cards, m micro-batch.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch import Tensor

from moedisco_ray.training.host_copies import Copies

T = TypeVar("T")

_LOOKS = 0.2
"""Time after which a thread that waits for another one looks whether that has failed (s)."""
_ENDS = 30.0
"""Time for the other cards to end what they do once one has failed (s)."""


@dataclasses.dataclass(frozen=True)
class Card:
    """A device of this machine.

    Attributes:
        number: Its number, from 0.
        device: The device.
        copies: Copies between the host's memory and it.
    """

    number: int
    device: torch.device
    copies: Copies


class _OtherFailedError(Exception):
    """Another card's thread has failed, and its error is the one to raise."""


class Cards(Sequence[Card]):
    """The cards of one training.

    Args:
        devices: Their devices.
        make_copies: Makes the copies of a device.
    """

    def __init__(self, devices: Sequence[torch.device], make_copies: Callable[[torch.device], Copies]) -> None:
        self._cards = [Card(number, device, make_copies(device)) for number, device in enumerate(devices)]
        self._failed = threading.Event()
        self._threads = ThreadPoolExecutor(len(devices), "card") if len(devices) > 1 else None

    def __len__(self) -> int:
        return len(self._cards)

    def __getitem__(self, number: int) -> Card:  # type: ignore[override]  # slices are not needed
        return self._cards[number]

    def each(self, work: Callable[[Card], None]) -> None:
        """Do something for every card at the same time; one card needs no thread.

        Raises:
            Exception: The first error of a card.
        """
        if self._threads is None:
            work(self._cards[0])
            return

        def on_its_device(card: Card) -> None:
            try:
                with torch.cuda.device(card.device) if card.device.type == "cuda" else contextlib.nullcontext():
                    work(card)
            except BaseException:
                self._failed.set()
                raise

        working = [self._threads.submit(on_its_device, card) for card in self._cards]
        try:
            wait(working, return_when=FIRST_EXCEPTION)
        except BaseException:  # such as Ctrl-C; the weights may not change any more when the caller goes on
            self._failed.set()
            wait(working, timeout=_ENDS)
            raise
        ended, _ = wait(working, timeout=_ENDS)  # a card that has died may never end
        errors = [error for each in ended if (error := each.exception()) is not None]
        for error in sorted(errors, key=lambda each: isinstance(each, _OtherFailedError)):
            raise error

    def waits(self, found: queue.SimpleQueue[T]) -> T:
        """The next item of a queue that another card fills."""
        while True:
            try:
                return found.get(timeout=_LOOKS)
            except queue.Empty:
                if self._failed.is_set():
                    raise _OtherFailedError from None


_Sent = tuple[Tensor, torch.cuda.Event | None]
"""A tensor in the host's memory, and the end of the copy that fills it."""


class Handover(abc.ABC):
    """Takes the hidden states of each micro-batch, or their gradients, from one part of a model to the next."""

    @abc.abstractmethod
    def put(self, card: Card, index: int, m: int, near: Tensor) -> None:
        """Hand on a tensor of a card that belongs to the inputs of part `index`."""

    @abc.abstractmethod
    def take(self, card: Card, index: int, m: int) -> Tensor:
        """The tensor, on the card; the thread waits until it has been handed on."""


class OnCard(Handover):
    """For a single card: the tensors stay on it."""

    def __init__(self) -> None:
        self._near: dict[tuple[int, int], Tensor] = {}

    def put(self, card: Card, index: int, m: int, near: Tensor) -> None:
        del card
        self._near[index, m] = near

    def take(self, card: Card, index: int, m: int) -> Tensor:
        del card
        return self._near.pop((index, m))


class ThroughHost(Handover):
    """For several cards: the tensors pass through the host's memory.

    Args:
        cards: The cards.
        end: Number of the last part, whose micro-batches are divided among the cards.
        place: Returns the place of a tensor in the host's memory.
    """

    def __init__(self, cards: Cards, end: int, place: Callable[[Card, int, int, Tensor], Tensor]) -> None:
        self._cards, self._end, self._place = cards, end, place
        self._queues: dict[tuple[int, int], queue.SimpleQueue[_Sent]] = {}

    def put(self, card: Card, index: int, m: int, near: Tensor) -> None:
        far = self._place(card, index, m, near)
        self._queue(index, m).put((far, card.copies.send(near, far)))

    def take(self, card: Card, index: int, m: int) -> Tensor:
        far, sent = self._cards.waits(self._queue(index, m))
        return card.copies.begin({"state": far}, sent, urgent=True)()["state"]

    def _queue(self, index: int, m: int) -> queue.SimpleQueue[_Sent]:
        # One of the two sides of the last part is a card that has some of the micro-batches, in their order.
        card = m % len(self._cards) if index == self._end else 0
        return self._queues.setdefault((index, card), queue.SimpleQueue())
