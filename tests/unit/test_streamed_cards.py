"""Several cards of one machine make a streamed step together: the result of one card, up to the order of two sums."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import BATCH, HeldOutText, L, run, stop_after, variant, weights, write_shard, write_tiny
from torch import Tensor

from moedisco_ray.core.config import Lora, Optimizer
from moedisco_ray.core.records.events import Event
from moedisco_ray.training import TrainJob, World, streamed_stepper, streamed_update
from moedisco_ray.training.host_copies import Copies
from moedisco_ray.training.optimizer import make_optimizer
from moedisco_ray.training.sharding import trainable

LAYERS = 5
TWO, THREE = ("cpu",) * 2, ("cpu",) * 3


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("cards")
    write_shard(home / "shard")
    for family in ("qwen3_moe", "deepseek_v3", "gpt_oss"):
        write_tiny(home / family, 4, family=family, layers=LAYERS)
    write_tiny(home / "tied", 4, tied=True, layers=LAYERS)
    return home


@pytest.fixture
def job(home: Path, tmp_path: Path) -> TrainJob:
    return TrainJob(
        stage="finetune",
        name="cards",
        model=home / "qwen3_moe",
        packed_dirs=(home / "shard",),
        output=tmp_path / "out",
        checkpoints=tmp_path / "steps",
        steps=4,
        sequence_length=L,
        optimizer=recipe(),
        checkpoint_every=None,
        memory="streamed",
        load_balance=0.02,
        z_loss=0.001,
        log_every=1,
    )


def recipe(**changes: Any) -> Optimizer:
    return Optimizer(**{"lr": 3e-3, "batch_tokens": BATCH * L, "micro_batch": 2, "warmup": 0.2, **changes})


def check_equal(ours: Path, theirs: Path) -> None:
    found, expected = weights(ours), weights(theirs)
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


def check_close(ours: Path, theirs: Path, tolerance: float) -> None:
    found = weights(ours)
    for key, expected in weights(theirs).items():
        torch.testing.assert_close(found[key], expected, rtol=tolerance, atol=tolerance, msg=key)


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "AdamW": ("qwen3_moe", {}, {}),
    "Muon": ("deepseek_v3", {"name": "muon"}, {}),
    "tied embeddings": ("tied", {"name": "muon"}, {}),
    "documents apart": ("gpt_oss", {"within_documents": True}, {}),
    # At a rate of 3e-3 one weight of 768 differed by 4e-4 on one processor: rounding decides its step.
    "blocks": ("tied", {"block_steps": 1, "lr": 1e-3}, {"steps": 8}),
    "no router losses": ("qwen3_moe", {}, {"load_balance": 0.0, "z_loss": 0.0}),
    "fewer micro-batches than cards": ("qwen3_moe", {"micro_batch": 6}, {}),
}


@pytest.mark.parametrize(
    ("case", "devices"),
    [
        ("AdamW", THREE),
        ("Muon", TWO),
        *(pytest.param(case, TWO, marks=pytest.mark.slow) for case in CASES if case not in ("AdamW", "Muon")),
    ],
)
def test_several_cards_give_the_result_of_one(job: TrainJob, home: Path, case: str, devices: tuple[str, ...]) -> None:
    """The gradient of the head is added up in another order, which AdamW magnifies where gradients are near zero."""
    model, changes, others = CASES[case]
    job = dataclasses.replace(job, model=home / model, optimizer=recipe(**changes), **others)
    one, several = variant(job, "one"), variant(job, "several")
    expected, found = run(one), run(several, devices=devices)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    check_close(several.output, one.output, 2e-4)


def test_where_the_head_does_not_train_the_bits_are_those_of_one_card(job: TrainJob, home: Path) -> None:
    job = dataclasses.replace(job, model=home / "gpt_oss", lora=Lora(rank=4))
    one, several = variant(job, "one"), variant(job, "several")
    run(one)
    run(several, devices=THREE)
    check_equal(several.output, one.output)


def test_the_same_cards_give_the_same_bits_whatever_their_threads_do(job: TrainJob) -> None:
    """In bf16, so that the random bits of rounding count too."""
    job = dataclasses.replace(job, optimizer=recipe(name="muon", precision="pure_bf16"))
    for name in ("first", "second"):
        run(variant(job, name), devices=THREE)
    check_equal(variant(job, "first").output, variant(job, "second").output)


@pytest.mark.parametrize(("first", "second"), [(TWO, ()), pytest.param((), TWO, marks=pytest.mark.slow)])
def test_a_training_goes_on_with_another_number_of_cards(
    job: TrainJob, first: tuple[str, ...], second: tuple[str, ...]
) -> None:
    whole, parts = variant(job, "whole"), variant(job, "parts")
    run(whole)
    assert not run(parts, stop=stop_after(2), devices=first).finished
    assert run(parts, devices=second).restored_step == 2
    check_close(parts.output, whole.output, 2e-4)


class BrokenError(Exception):
    """A copy fails."""


class BrokenCopies(Copies):
    """The second card's copies to the host fail from some copy on."""

    made = 0
    left = 0

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        type(self).made += 1
        self._is_broken = type(self).made % 2 == 0

    def send(self, near: Tensor, far: Tensor) -> torch.cuda.Event | None:
        if self._is_broken:
            type(self).left -= 1
            if type(self).left < 0:
                raise BrokenError
        return super().send(near, far)


@pytest.mark.parametrize("left", [0, 30])
@pytest.mark.timeout(60)
def test_an_error_of_one_card_ends_the_step_of_all(job: TrainJob, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    """The others wait for what it would have handed on."""
    monkeypatch.setattr(streamed_stepper, "Copies", BrokenCopies)
    monkeypatch.setattr(BrokenCopies, "left", left)
    with pytest.raises(BrokenError):
        run(job, devices=TWO)


class Late:
    """A copy to the host that is made when something waits for it."""

    def __init__(self, near: Tensor, far: Tensor, make: Callable[[Late], None]) -> None:
        self.near, self.far, self._make = near.detach(), far.detach(), make
        self.far.fill_(torch.nan)

    def make(self) -> None:
        self._make(self)


class LateCopies(Copies):
    """Copies to the host as late as their order allows, as a GPU may make them: one waits for all sent before it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._late: list[Late] = []
        self._lock = threading.RLock()

    def send(self, near: Tensor, far: Tensor) -> Any:
        with self._lock:
            late = Late(near, far, self._make_until)
            self._late.append(late)
        return late

    def _make_until(self, last: Late) -> None:
        with self._lock:
            while last in self._late:
                late = self._late.pop(0)
                late.far.copy_(late.near)

    def begin(
        self, tensors: Mapping[str, Tensor], *after: Any, urgent: bool = False
    ) -> Callable[[], dict[str, Tensor]]:
        del urgent
        for sent in after:
            sent.make()
        with self._lock:
            places = {tensor.data_ptr() for tensor in tensors.values()}
            for late in [each for each in self._late if each.far.data_ptr() in places]:
                late.make()
        return super().begin(tensors)

    def finish(self) -> None:
        with self._lock:
            if self._late:
                self._late[-1].make()


def test_cards_wait_for_what_others_send(job: TrainJob, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read before it has arrived is not a number."""
    job = dataclasses.replace(job, model=home / "tied", optimizer=recipe(name="muon"))
    usual, late = variant(job, "usual"), variant(job, "late")
    run(usual, devices=TWO)
    monkeypatch.setattr(streamed_stepper, "Copies", LateCopies)
    run(late, devices=TWO)
    check_equal(late.output, usual.output)


def test_evaluations_are_those_of_one_card(job: TrainJob, home: Path) -> None:
    found = []
    for devices in ((), TWO):
        events: list[Event] = []
        job_here = dataclasses.replace(variant(job, f"on-{len(devices)}", held_out=HeldOutText()), lora=Lora(rank=4))
        run(dataclasses.replace(job_here, model=home / "gpt_oss"), events.append, devices=devices)
        found.append([each.data["held_out_loss"] for each in events if each.type == "evaluation"])
    assert len(found[0]) == 2
    assert found[1] == found[0]


def test_cards_get_about_equal_parts_of_the_update(job: TrainJob) -> None:
    """Before: in turn, so that one had all of the larger of two stacks of matrices per layer."""
    model = trainable(job.model, recipe(name="muon"), World(), memory="streamed")
    optimizer = make_optimizer(model, dataclasses.replace(job, optimizer=recipe(name="muon")), World())
    pieces = [
        (owner, group, each, slice(0, len(each)))
        for owner, group in streamed_update._groups(optimizer)
        for each in group["params"]
    ]
    parts = [sum(itertools.starmap(streamed_update._work, part)) for part in streamed_update._divided(pieces, 2)]
    assert max(parts) < 1.1 * min(parts)
