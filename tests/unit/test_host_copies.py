"""Copies between host and device overtake nothing that they need, and few groups are on the device at once."""

from __future__ import annotations

import types
from collections.abc import Iterator

import pytest
import torch
from lazy_streams import LazyCopies, LazyEvent, lazy_streams

from moedisco_ray.core.errors import ConfigError
from moedisco_ray.training import moments
from moedisco_ray.training.host_copies import Ahead, Copies

CPU = torch.device("cpu")


def test_a_tensor_that_is_leaving_comes_back_as_it_left() -> None:
    """Before: a copy to the device read the host's memory that the copy to the host had not written."""
    with lazy_streams():
        copies, far, near = LazyCopies(CPU), torch.zeros(2), torch.ones(2)
        copies.send(near, far)
        assert copies.begin({"far": far})()["far"].tolist() == [1, 1]


def test_copies_to_the_device_do_not_wait_for_other_tensors_to_leave() -> None:
    with lazy_streams():
        copies, far = LazyCopies(CPU), torch.zeros(2)
        copies.send(torch.ones(2), far)
        copies.begin({"other": torch.zeros(2)})()
        assert not far.any()
        copies.finish()
        assert far.all()


@pytest.mark.parametrize("asks", [True, False])
def test_two_groups_are_on_the_device_where_nothing_leaves_it(monkeypatch: pytest.MonkeyPatch, asks: bool) -> None:
    """Before: nothing stopped the CPU from asking for all layers of an evaluation at once."""
    known = asked = 0  # groups that the CPU knows to be computed, and for which it has asked

    def note(event: LazyEvent) -> None:
        nonlocal known
        known = max(known, event.count)

    def groups() -> Iterator[dict[str, torch.Tensor]]:
        nonlocal asked
        for number in range(9):
            asked = number + 1
            assert asked - known <= 2
            yield {"weight": torch.zeros(1)}

    monkeypatch.setattr(LazyEvent, "synchronize", note)
    with lazy_streams() as computing:
        monkeypatch.setattr(computing, "wait_event", lambda _: None)
        ahead = Ahead(LazyCopies(CPU), groups())
        for number in range(9):
            ahead.take()
            computing.add(lambda: None)
            if asks:
                ahead.ask()
                assert known == number  # the device has work while the CPU waits
        assert asked == 9


def test_a_group_too_many_is_an_error() -> None:
    ahead = Ahead(Copies(CPU), [{"weight": torch.zeros(1)}])
    ahead.take()
    with pytest.raises(IndexError):
        ahead.take()


@pytest.mark.parametrize(
    ("streamed", "message"),
    [
        (True, r"^pools\.\*\.memory: 'streamed': .*set it to resident"),
        (False, r"^optimizer\.offload_moments: True: .*set it to false"),
    ],
)
def test_memory_that_cannot_be_locked_names_the_setting_that_needs_it(
    monkeypatch: pytest.MonkeyPatch, streamed: bool, message: str
) -> None:
    """Before: streamed training named `optimizer.offload_moments`, which its user has not set."""
    runtime = types.SimpleNamespace(cudaHostRegister=lambda *_: 2, cudaGetErrorString=lambda _: "out of memory")
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    copies, moment = Copies(CPU), torch.zeros(4)
    copies._in = LazyCopies(CPU)._in
    with pytest.raises(ConfigError, match=message):
        copies.pin(moment) if streamed else moments.locked(moment)
