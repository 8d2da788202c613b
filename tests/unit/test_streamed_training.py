"""Streamed training gives the bits of resident training, whatever trains, and wherever it is interrupted."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lazy_streams import LazyCopies, lazy_streams
from tiny_training import BATCH, HeldOutText, L, V, run, stop_after, variant, weights, write_shard, write_tiny
from torch import Tensor

from moedisco_ray.core.config import FamilyName, Lora, Optimizer
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.records.events import Event
from moedisco_ray.models import attention
from moedisco_ray.packed_tokens import write_conversations, write_index
from moedisco_ray.training import TrainJob, World, muon, optimizer, streamed_stepper, streamed_update
from moedisco_ray.training.batches import Batches
from moedisco_ray.training.host_copies import Copies
from moedisco_ray.training.sharding import trainable
from moedisco_ray.training.streamed_stepper import StreamedStepper, check_streamed

FAMILIES: tuple[FamilyName, ...] = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
STEPS = 6


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("streamed")
    write_shard(home / "shard")
    write_chats(home / "chats")
    for family in FAMILIES:
        write_tiny(home / family, 4, family=family)
    write_tiny(home / "tied", 4, tied=True)
    write_tiny(home / "frozen", 1)  # whose routers do not train
    return home


def write_chats(directory: Path) -> None:
    """Conversations of 3 to 20 tokens; the loss counts every second token."""
    directory.mkdir()
    random = np.random.Generator(np.random.Philox(key=[3, 4]))
    lengths = random.integers(3, 21, size=150)
    ids = random.integers(1, V, size=lengths.sum())
    path, mask = directory / "part-00000.npy", np.arange(len(ids)) % 2 == 0
    write_index(directory, [write_conversations(path, ids, mask, lengths, length=L, vocab_size=V)], V, L)


@pytest.fixture
def job(home: Path, tmp_path: Path) -> TrainJob:
    return TrainJob(
        stage="finetune",
        name="streamed",
        model=home / "qwen3_moe",
        packed_dirs=(home / "shard",),
        output=tmp_path / "out",
        checkpoints=tmp_path / "steps",
        steps=STEPS,
        sequence_length=L,
        optimizer=recipe(),
        checkpoint_every=None,
        load_balance=0.02,
        z_loss=0.001,
        log_every=1,
    )


def recipe(**changes: Any) -> Optimizer:
    return Optimizer(**{"lr": 3e-3, "batch_tokens": BATCH * L, "micro_batch": 2, "warmup": 0.2, **changes})


def check_same_bits(job: TrainJob) -> None:
    resident, streamed = variant(job, "resident"), variant(job, "streamed", memory="streamed")
    assert run(streamed).losses == run(resident).losses
    check_same_weights(streamed.output, resident.output)


def check_same_weights(ours: Path, theirs: Path) -> None:
    found, expected = weights(ours), weights(theirs)
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_some_steps_give_the_bits_of_resident_training(job: TrainJob, name: str) -> None:
    check_same_bits(dataclasses.replace(job, optimizer=recipe(name=name)))


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "tied embeddings": ("tied", {"name": "muon"}, {}),
    "routers that do not train": ("frozen", {}, {}),
    "no router losses": ("qwen3_moe", {}, {"load_balance": 0.0, "z_loss": 0.0}),
    "documents apart": ("gpt_oss", {"within_documents": True}, {}),
    "an uneven last micro-batch": ("qwen3_moe", {"micro_batch": 4}, {}),
    "blocks": ("tied", {"block_steps": 1}, {"steps": 8}),
    "moments in 8 bits": ("qwen3_moe", {"moments": "fp8"}, {}),
    "weights in bf16, by Muon": ("mixtral", {"precision": "pure_bf16", "name": "muon"}, {}),
    "products in bf16": ("qwen3_moe", {"precision": "bf16"}, {}),
    "adapters": ("gpt_oss", {}, {"lora": Lora(rank=4)}),
    "adapters on 4 bits": ("qwen3_moe", {}, {"lora": Lora(rank=4, base="nf4")}),
}


@pytest.mark.parametrize("case", CASES)
def test_whatever_trains_the_bits_are_those_of_resident_training(job: TrainJob, home: Path, case: str) -> None:
    model, changes, others = CASES[case]
    check_same_bits(dataclasses.replace(job, model=home / model, optimizer=recipe(**changes), **others))


def test_chats_give_the_bits_of_resident_training(job: TrainJob, home: Path) -> None:
    check_same_bits(dataclasses.replace(job, packed_dirs=(home / "chats",)))


def test_pieces_of_large_weights_are_updated_as_the_whole(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (streamed_update, muon, optimizer):
        monkeypatch.setattr(module, "STEP_ELEMENTS", 2048)
    check_same_bits(dataclasses.replace(job, optimizer=recipe(name="muon")))


def test_evaluations_during_training_are_those_of_resident_training(job: TrainJob) -> None:
    found: dict[str, list[float]] = {}
    for memory in ("resident", "streamed"):
        events: list[Event] = []
        run(variant(job, memory, memory=memory, held_out=HeldOutText(), optimizer=recipe(name="muon")), events.append)
        found[memory] = [each.data["held_out_loss"] for each in events if each.type == "evaluation"]
    assert len(found["resident"]) == STEPS // 2
    assert found["streamed"] == found["resident"]


@pytest.mark.parametrize("memories", [("streamed", "streamed"), ("resident", "streamed"), ("streamed", "resident")])
def test_a_training_goes_on_from_a_checkpoint_of_either_kind(job: TrainJob, memories: tuple[str, str]) -> None:
    job = dataclasses.replace(job, optimizer=recipe(name="muon"))
    whole = variant(job, "whole")
    run(whole)
    first, second = (variant(job, "parts", memory=memory) for memory in memories)
    assert not run(first, stop=stop_after(3)).finished
    assert run(second).restored_step == 3
    check_same_weights(second.output, whole.output)


class TornError(Exception):
    """The process dies."""


class FailingCopies(Copies):
    """Fails at one of the copies to the host."""

    left = 0

    def send(self, near: Tensor, far: Tensor) -> None:
        type(self).left -= 1
        if not self.left:
            raise TornError
        super().send(near, far)


@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_training_that_dies_inside_a_step_loses_only_the_step(
    job: TrainJob, monkeypatch: pytest.MonkeyPatch, part: float
) -> None:
    """The later one is inside the update, when some weights are new and others are old."""
    job = dataclasses.replace(job, optimizer=recipe(name="muon"), checkpoint_every=1)
    whole, torn = variant(job, "whole"), variant(job, "torn", memory="streamed")
    run(whole)
    with monkeypatch.context() as patch:
        patch.setattr(streamed_stepper, "Copies", FailingCopies)
        patch.setattr(FailingCopies, "left", 0)
        run(variant(torn, "counted", steps=1))
        per_step, FailingCopies.left = -FailingCopies.left, round((3 + part) * -FailingCopies.left)
        assert per_step > 30
        with pytest.raises(TornError):
            run(torn)
    assert run(torn).restored_step == 3
    check_same_weights(torn.output, whole.output)


def some_alive(tensors: list[weakref.ref[Tensor]]) -> bool:
    return any(each() is not None for each in tensors)


class WatchedCopies(Copies):
    """Notes how many groups are on the device when another one is asked for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.begun = 0
        self.most_groups = 0
        self._alive: list[list[weakref.ref[Tensor]]] = []

    def begin(self, tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        wait = super().begin(tensors)
        self.begun += 1
        self._alive.append([weakref.ref(each) for each in wait().values()])
        self._alive = [group for group in self._alive if some_alive(group)]
        self.most_groups = max(self.most_groups, len(self._alive))
        return wait


@pytest.mark.parametrize(("lazy_in", "lazy_out"), [(False, True), (True, False), (True, True)])
def test_the_streams_of_a_gpu_change_no_bit_however_late_their_copies_are(
    job: TrainJob, home: Path, monkeypatch: pytest.MonkeyPatch, lazy_in: bool, lazy_out: bool
) -> None:
    """Before: the backward pass of the last layer read inputs that had not arrived in the host's memory."""
    job = dataclasses.replace(job, model=home / "tied", optimizer=recipe(name="muon"), steps=2)
    resident, streamed = variant(job, "resident"), variant(job, "streamed", memory="streamed")
    run(resident)
    monkeypatch.setattr(streamed_stepper, "Copies", LazyCopies)
    monkeypatch.setattr(LazyCopies, "lazy_in", lazy_in)
    monkeypatch.setattr(LazyCopies, "lazy_out", lazy_out)
    with lazy_streams():
        run(streamed)
    check_same_weights(streamed.output, resident.output)


def test_inputs_are_kept_of_the_layers_that_the_backward_pass_reaches(job: TrainJob) -> None:
    """Before: those of all layers were copied to the host."""
    model: Any = trainable(job.model, job.optimizer, World(), memory="streamed")
    for part in (model.model.embed_tokens, *model.model.layers[:-1]):
        part.requires_grad_(requires_grad=False)
    stepper = StreamedStepper(model, dataclasses.replace(job, memory="streamed"), World())
    stepper._checked = True  # of the experts of all layers
    with Batches(job, World()) as batches:
        stepper(batches(0))
    assert {index for _, index, _ in stepper._places} == {len(model.model.layers) - 1}


def test_bounds_of_documents_are_computed_once_per_micro_batch(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: for every layer and pass, and each time the CPU waited for the GPU."""
    usual, computed = attention.document_bounds, list[Tensor]()

    def counted(positions_BL: Tensor) -> Tensor:
        computed.append(usual(positions_BL))
        return computed[-1]

    monkeypatch.setattr(attention, "_has_kernel", lambda *_: True)
    monkeypatch.setattr(attention, "varlen_attn", lambda q_THd, *_, **__: q_THd)
    monkeypatch.setattr(attention, "document_bounds", counted)
    within = recipe(within_documents=True)
    run(variant(job, "streamed", memory="streamed", optimizer=within, steps=1))
    assert len(computed) == BATCH // 2


def test_a_layer_is_freed_before_the_next_one_is_asked_for(job: TrainJob) -> None:
    copies = WatchedCopies(torch.device("cpu"))
    model = trainable(job.model, job.optimizer, World(), memory="streamed")
    stepper = StreamedStepper(model, dataclasses.replace(job, memory="streamed"), World(), lambda _: copies)
    gc.collect()
    gc.disable()
    with Batches(job, World()) as batches:
        for step in range(2):
            stepper(batches(step))
    gc.enable()
    assert copies.begun > 2 * len(list(model.parameters()))
    assert copies.most_groups == 2


def test_what_streamed_training_does_not_do_is_refused_by_name(job: TrainJob) -> None:
    streamed = variant(job, "streamed", memory="streamed", optimizer=recipe(compile=True))
    with pytest.raises(ConfigError, match=r"optimizer\.compile.*memory: resident"):
        run(streamed)
    with pytest.raises(ConfigError, match="trains on one worker, not on 2"):
        check_streamed(dataclasses.replace(job, memory="streamed"), World(size=2))
