"""The check of a worker's GPU, and the nodes that a run leaves out, without a GPU and without Ray."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from ray.exceptions import GetTimeoutError

from moedisco_ray.core.config import HighMemoryPool, LowMemoryPool
from moedisco_ray.core.errors import CardError, raise_together
from moedisco_ray.core.records.events import Event
from moedisco_ray.execution import card_product
from moedisco_ray.execution.ray import card_check, nodes_aside, seats
from moedisco_ray.execution.ray.card_check import check_card
from moedisco_ray.execution.ray.nodes_aside import NodesAside
from moedisco_ray.policies.setting_aside import Place

FIELD = "pools.low_memory.gpu"
LOW, HIGH = LowMemoryPool(gpu=1), HighMemoryPool(gpu=1)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A made-up card, which computes on the CPU, with a made-up driver and node. Its process sees another one, too."""
    product_sum = card_product._product_sum

    def on_the_cpu(device: str) -> float:
        assert device in ("cpu", "cuda:1")
        return product_sum("cpu")

    monkeypatch.setattr(card_product, "_product_sum", on_the_cpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _index: "NVIDIA L4")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    monkeypatch.setattr(card_product.socket, "gethostname", lambda: "host-7")
    here = SimpleNamespace(get_node_id=lambda: "node-7")
    monkeypatch.setattr(
        card_check,
        "ray",
        SimpleNamespace(
            util=SimpleNamespace(get_node_ip_address=lambda: "10.0.0.7"),
            get_runtime_context=lambda: here,
            get_gpu_ids=lambda: [3],
        ),
    )
    monkeypatch.setattr(card_product, "_DRIVER_FILE", tmp_path / "version")
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\nGCC 12\n"
    )
    return monkeypatch


def fails_with(error: Exception) -> Callable[[str], float]:
    def fails(device: str) -> float:
        raise error

    return fails


def test_a_card_that_computes_passes(card: pytest.MonkeyPatch) -> None:
    check_card(FIELD)


def test_the_line_names_node_card_torch_driver_cause_and_remedy(card: pytest.MonkeyPatch) -> None:
    words = "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver.\nMore."
    card.setattr(card_product, "_product_sum", fails_with(RuntimeError(words)))
    with pytest.raises(CardError) as failed:
        check_card(FIELD)
    assert str(failed.value) == (
        "pools.low_memory.gpu: 1: torch cannot use card 3 (NVIDIA L4) of node host-7 (10.0.0.7): The NVIDIA driver on "
        "your system is too old (found version 12020). Please update your GPU driver (torch 2.13.0 for CUDA 13.0, "
        "NVIDIA driver 535.104.05); install a driver there that fits torch's CUDA, or a torch build that fits the "
        "driver, or set pools.low_memory.gpu=0"
    )
    assert failed.value.node_id == "node-7"


def test_what_torch_and_the_card_say_cannot_move_the_cursor(card: pytest.MonkeyPatch) -> None:
    card.setattr(
        card_product, "_product_sum", fails_with(RuntimeError("CUDA error: \x1b[2Junspecified launch failure"))
    )
    card.setattr(torch.cuda, "get_device_name", lambda _index: "a\x1b[31mcard\nwith lines")
    with pytest.raises(CardError) as failed:
        check_card(FIELD)
    assert str(failed.value).isprintable()


def test_a_machine_without_card_and_driver_says_so(card: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card.setattr(torch.version, "cuda", None)
    card.setattr(torch.cuda, "get_device_name", fails_with(AssertionError("Torch not compiled with CUDA enabled")))
    card.setattr(
        card_product, "_product_sum", fails_with(AssertionError("Torch not compiled with CUDA enabled"))
    )  # whatever torch is installed
    card.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "version").unlink()
    with pytest.raises(
        CardError, match=r"card 0 of node .*: Torch not compiled .*torch 2\.13\.0 without CUDA, no NVIDIA driver found"
    ):
        check_card(FIELD)


def test_a_card_that_computes_something_else_fails(card: pytest.MonkeyPatch) -> None:
    answers = iter([1.0, 2.0])
    card.setattr(card_product, "_product_sum", lambda _device: next(answers))
    with pytest.raises(CardError, match="computes 1 in place of 2"):
        check_card(FIELD)


def test_a_card_whose_memory_others_hold_is_not_broken(card: pytest.MonkeyPatch) -> None:
    card.setattr(card_product, "_product_sum", fails_with(RuntimeError("CUDA error: out of memory")))
    check_card(FIELD)


def error_of(node: str) -> CardError:
    return CardError(FIELD, 1, f"torch cannot use card 0 of node {node}", node)


def test_an_error_keeps_its_node_and_those_found_with_it_on_its_way_to_the_driver() -> None:
    with pytest.raises(CardError) as raised:
        raise_together([error_of("a"), error_of("b")])
    arrived = pickle.loads(pickle.dumps(raised.value))
    assert [arrived.node_id, *(other.node_id for other in arrived.others)] == ["a", "b"]
    assert str(arrived) == str(error_of("a"))


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Two nodes with two slots each, and no autoscaler."""
    resources = {"low_mem_gpu": 2.0, "GPU": 2.0}
    found = [{"NodeID": name, "Alive": True, "Resources": resources, "Labels": {}} for name in ("a", "b")]
    for module in (nodes_aside.ray, nodes_aside.session.ray):
        monkeypatch.setattr(module, "nodes", lambda: found)
    return found


@pytest.mark.usefixtures("nodes")
def test_a_node_is_left_out_and_named_once() -> None:
    aside, events = NodesAside(), list[Event]()
    assert aside.selector(LOW) == {}
    for _ in range(2):
        aside.put(error_of("a"), events.append)
    assert [(event.type, event.data["message"]) for event in events] == [
        ("warning", "pools.low_memory.gpu: 1: torch cannot use card 0 of node a; the run continues without this node")
    ]
    assert aside.of(LOW) == aside.of(HIGH) == {"a"}
    assert aside.selector(LOW) == {"ray.io/node-id": "!in(a)"}
    assert (aside.of(LowMemoryPool()), aside.selector(LowMemoryPool())) == (set(), {})  # its workers need no GPU
    assert nodes_aside.session.slots(LOW, aside.of(LOW)) == 2


def test_a_run_ends_once_no_slot_is_left_that_could_work(nodes: list[dict[str, Any]]) -> None:
    aside = NodesAside()
    aside.check(LOW)
    aside.put(error_of("a"), lambda _event: None)
    aside.check(LOW, 2)
    with pytest.raises(CardError, match="node a"):
        aside.check(LOW, 3)
    aside.put(error_of("b"), lambda _event: None)
    with pytest.raises(CardError):
        aside.check(LOW)
    aside.check(HIGH)  # no node offers its tag: the run waits for one
    aside.check(LowMemoryPool())
    nodes[0]["Labels"] = {"ray.io/node-group": "spot"}  # an autoscaler's
    aside.check(LOW)


def test_an_autoscaler_that_brings_only_such_nodes_is_not_waited_for(nodes: list[dict[str, Any]]) -> None:
    """Its image has the wrong driver: each further node would be started, billed and put aside."""
    nodes[0]["Labels"] = {"ray.io/node-group": "spot"}
    aside = NodesAside()
    for number in range(nodes_aside.MOST_IN_A_ROW - 1):
        aside.put(error_of(f"first-{number}"), lambda _event: None)
    aside.check(LOW)
    aside.found_working()
    for number in range(nodes_aside.MOST_IN_A_ROW):
        aside.check(LOW)
        aside.put(error_of(f"later-{number}"), lambda _event: None)
    with pytest.raises(CardError, match=f"node later-{nodes_aside.MOST_IN_A_ROW - 1}"):
        aside.check(LOW)
    aside.check(LowMemoryPool())


def test_a_card_that_hangs_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(_reference: object, timeout: float) -> None:
        raise GetTimeoutError(f"{timeout}")

    monkeypatch.setattr(seats.ray, "get", never)
    aside = NodesAside()
    seat = seats.Seat(mock.MagicMock(), "seat", LOW, aside, Place("n1"))
    with pytest.raises(CardError, match=r"^pools\.low_memory\.gpu: 1: torch does not finish .* node n1 within 180 s; "):
        seat.run("train", lambda: None)
    assert not seat.checked
