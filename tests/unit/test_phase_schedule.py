"""A training in phases, with a dense gate, a spike guard and an early end."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_training import BATCH, RECIPE, L, ignore, run, stop_after, variant, weights, write_shard, write_tiny
from transformers import AutoModelForCausalLM

from moedisco_ray.core.config import FAMILIES, Finetune, Phase
from moedisco_ray.core.events import Event
from moedisco_ray.models import ModelMap, Role, same_bits
from moedisco_ray.policies import early_stopping
from moedisco_ray.stages.scoring import document_nats, fill, plan_batches
from moedisco_ray.training import TrainJob, World, learning_rate
from moedisco_ray.training.checkpoints.checkpoint import Progress
from moedisco_ray.training.packed_tokens import TokenStream, batch_indices
from moedisco_ray.training.phase_schedule import PhaseSchedule, phase_spans, rate
from moedisco_ray.training.spikes import SpikeGuard

STAGED = (Phase(train="router", share=0.25), Phase(train="backbone", share=0.25), Phase(train="all", share=0.5))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("course")
    torch.set_num_threads(1)
    write_shard(home / "shard")
    for family in FAMILIES:
        write_tiny(home / family, 4, family=family)
    return home


@pytest.fixture
def job(home: Path, tmp_path: Path) -> TrainJob:
    return TrainJob(
        stage="finetune", name="finetune", model=home / "qwen2_moe", shards=(home / "shard",), output=tmp_path / "out",
        checkpoints=tmp_path / "steps", steps=8, sequence_length=L, optimizer=RECIPE, checkpoint_every=100, seed=5,
        load_balance=0.02, z_loss=0.01, log_every=2)


def roles_that_moved(job: TrainJob) -> set[Role]:
    names = ModelMap(job.model.name)
    before, after = weights(job.model), weights(job.output)
    return {names.classify(key).role for key in before if not same_bits(before[key], after[key])}


# --- which step does what


@st.composite
def phases(draw: st.DrawFn) -> tuple[Phase, ...]:
    parts = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    return tuple(Phase(train=draw(st.sampled_from(["router", "backbone", "all"])), share=part / sum(parts)) for part in parts)


@given(phases(), st.integers(1, 300))
def test_every_step_belongs_to_one_phase_and_each_has_its_share(parts: tuple[Phase, ...], steps: int) -> None:
    found = phase_spans(parts, steps)
    assert [step for each in found for step in range(each.start, each.stop)] == list(range(steps))
    if all(part.share * steps >= 1 for part in parts):
        assert [each.train for each in found] == [part.train for part in parts]
        for each, part in zip(found, parts, strict=True):
            assert abs((each.stop - each.start) - part.share * steps) <= 1


@given(phases(), st.integers(2, 300))
def test_a_phase_warms_up_under_the_schedule_of_the_whole(parts: tuple[Phase, ...], steps: int) -> None:
    for each in phase_spans(parts, steps):
        ramp = math.ceil(RECIPE.warmup * (each.stop - each.start))
        for step in range(each.start, each.stop):
            whole = learning_rate(step, steps, RECIPE)
            risen = 1.0 if each.start == 0 else min(1.0, (step - each.start + 1) / ramp)
            assert rate(step, steps, each, RECIPE) == pytest.approx(whole * risen)


def test_shares_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match=r"phases have shares of 0\.5 in all; make them add up to 1"):
        Finetune(phases=[{"train": "router", "share": 0.5}])


# --- what learns


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train", ["router", "backbone"])
def test_only_what_is_named_learns(home: Path, job: TrainJob, family: str, train: str) -> None:
    tuned = variant(job, train, model=home / family, phases=(Phase(train=train, share=1.0),), steps=3)
    run(tuned)
    backbone = {Role.BACKBONE, Role.SHARED_EXPERT} if family == "qwen2_moe" else {Role.BACKBONE}
    assert roles_that_moved(tuned) == ({Role.ROUTER} if train == "router" else {Role.ROUTER} | backbone)


LEARNS = {"router": r"\.mlp\.gate\.", "backbone": r"^(?!.*\.mlp\.experts\.)", "all": ""}
"""What a name has in it that learns."""


def by_plain_pytorch(job: TrainJob, course: tuple[str, ...]) -> list[float]:
    """Losses of the same training in a plain loop, with what learns in each step by name."""
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).train()
    decays, others = ([p for p in model.parameters() if (p.ndim > 1) is decays] for decays in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": decays, "weight_decay": RECIPE.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=RECIPE.betas, foreach=False)
    stream, losses = TokenStream(job.shards, L), []
    for step, learns in enumerate(course):
        start, length = course.index(learns), course.count(learns)
        rise = 1.0 if start == 0 else min(1.0, (step - start + 1) / math.ceil(RECIPE.warmup * length))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(course), RECIPE) * rise
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(re.search(LEARNS[learns], name) is not None)
        rows = torch.stack([torch.from_numpy(stream.window(int(i))) for i in batch_indices(job.seed, step, BATCH, len(stream))])
        loss = torch.nn.functional.cross_entropy(model(input_ids=rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], RECIPE.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", FAMILIES)
def test_phases_are_a_plain_loop_that_freezes_by_name(home: Path, job: TrainJob, family: str) -> None:
    staged = variant(job, "staged", model=home / family, phases=STAGED, steps=24, load_balance=0.0, z_loss=0.0)
    course = ("router",) * 6 + ("backbone",) * 6 + ("all",) * 12
    assert run(staged).losses == pytest.approx(by_plain_pytorch(staged, course), rel=1e-5)


def test_one_phase_of_everything_is_no_phases(job: TrainJob) -> None:
    plain, staged = variant(job, "plain"), variant(job, "one", phases=(Phase(train="all", share=1.0),))
    assert run(plain).losses == run(staged).losses


@pytest.mark.parametrize("state", ["fp32", "bf16"])
@pytest.mark.parametrize("at", range(1, 8))
def test_a_staged_training_resumes_bit_for_bit(job: TrainJob, at: int, state: str) -> None:
    """Also where what learns changes, and however phases follow one another."""
    recipe = RECIPE.model_copy(update={"state": state})
    course = {"phases": (*STAGED[:2], *(Phase(train=train, share=0.25) for train in ("all", "router"))),
              "dense_steps": 3, "spike_guard": 1.5, "optimizer": recipe}
    whole, cut = variant(job, "whole", **course), variant(job, "cut", **course)
    expected = run(whole)
    assert not run(cut, stop=stop_after(at)).finished
    assert run(cut).losses == expected.losses
    before, after = weights(whole.output), weights(cut.output)
    assert all(same_bits(before[key], after[key]) for key in before)


@dataclasses.dataclass(frozen=True)
class Text:
    """Held-out documents."""

    every: int
    documents: list[NDArray[np.int64]]

    def batches(self, batch_tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        lengths_N = np.array([len(document) for document in self.documents])
        return (fill(self.documents, windows, 0) for windows in plan_batches(lengths_N, L, batch_tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_gate_uses_every_expert(home: Path, job: TrainJob, family: str) -> None:
    dense = variant(job, "dense", model=home / family, dense_steps=1, steps=2, load_balance=0.0, z_loss=0.0)
    first, second = run(dense).losses
    stream = TokenStream(job.shards, L)
    rows = torch.stack([torch.from_numpy(stream.window(int(i))) for i in batch_indices(job.seed, 0, BATCH, len(stream))])
    with torch.no_grad():
        losses = {
            k: torch.nn.functional.cross_entropy(AutoModelForCausalLM.from_pretrained(
                dense.model, num_experts_per_tok=k)(input_ids=rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten()).item()
            for k in (2, 4)}
    assert first == pytest.approx(losses[4], rel=1e-6)
    assert first != pytest.approx(losses[2], rel=1e-6)
    assert math.isfinite(second)


def test_looks_during_a_dense_gate_are_at_the_model_that_is_written(home: Path, job: TrainJob) -> None:
    documents = [np.arange(1, 30) + number for number in range(6)]
    looks: list[Event] = []
    dense = variant(job, "looks", dense_steps=4, steps=4, held_out=Text(2, documents))
    run(dense, looks.append)
    seen = [event.data["held_out_loss"] for event in looks if event.type == "evaluation"]
    losses = []
    for top_k in (2, 4):
        model = AutoModelForCausalLM.from_pretrained(dense.output, num_experts_per_tok=top_k)
        nats_N = document_nats(model, documents, prefix=0, sequence_length=L)
        losses.append(float(nats_N.sum()) / sum(map(len, documents)))
    assert len(seen) == 2
    assert seen[-1] == pytest.approx(losses[0], rel=1e-5)
    assert seen[-1] != pytest.approx(losses[1], rel=1e-5)


# --- what is left out


def refusals(job: TrainJob, norms: list[float], events: list[Event]) -> list[bool]:
    guard = SpikeGuard(job, World(), events.append, Progress(), lambda _: False)
    return [guard.refuses(step, torch.tensor(norm)) for step, norm in enumerate(norms)]


def test_a_gradient_that_stands_out_is_left_out_and_told(job: TrainJob) -> None:
    events: list[Event] = []
    guarded = variant(job, "guarded", spike_guard=3.0)
    refused = refusals(guarded, [1.5] * 16 + [4.4, 4.6, 1.0, math.inf], events)
    assert [step for step, left_out in enumerate(refused) if left_out] == [17]
    assert [event.data["message"] for event in events] == [
        "finetune: step 18 left out, its gradient's norm 4.6 is 3.1 times the usual 1.5"]


def test_gradients_of_another_kind_of_step_are_no_measure(job: TrainJob) -> None:
    phased = variant(job, "phased", spike_guard=3.0)
    guard = SpikeGuard(phased, World(), ignore, Progress(), lambda step: step == 20)
    refused = [guard.refuses(step, torch.tensor(norm)) for step, norm in enumerate([1.0] * 20 + [5.0] * 16 + [16.0])]
    assert [step for step, left_out in enumerate(refused) if left_out] == [36]


@pytest.mark.parametrize(("dense_steps", "changes"), [(0, [10, 20]), (5, [5, 10, 20]), (40, [10, 20])])
def test_steps_are_of_another_kind_where_a_phase_begins_or_the_gate_ends(
    home: Path, dense_steps: int, changes: list[int],
) -> None:
    model = AutoModelForCausalLM.from_pretrained(home / "qwen2_moe")
    course = PhaseSchedule(model, "qwen2_moe", STAGED, 40, RECIPE, dense_steps)
    assert [step for step in range(40) if course.changes_at(step)] == changes
    assert course.alike_from == max(20, dense_steps)


def test_nothing_stands_out_among_few_or_without_a_guard(job: TrainJob) -> None:
    assert not any(refusals(variant(job, "few", spike_guard=1.1), [1.0] * 15 + [100.0], []))
    assert not any(refusals(job, [1.0] * 100 + [100.0], []))


def test_gradients_that_stay_larger_are_the_usual_ones_after_half_of_what_is_remembered(job: TrainJob) -> None:
    refused = refusals(variant(job, "phased", spike_guard=3.0), [1.0] * 100 + [5.0] * 100, [])
    assert [step for step, left_out in enumerate(refused) if left_out] == list(range(100, 132))


def test_a_step_that_is_left_out_changes_no_weight(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SpikeGuard, "refuses", lambda _guard, step, _norm: step >= 2)
    short = variant(job, "short", steps=4, optimizer=RECIPE.model_copy(update={"schedule": "constant", "warmup": 0.0}))
    long = variant(short, "long", steps=8)
    run(short)
    run(long)
    before, after = weights(short.output), weights(long.output)
    assert all(same_bits(before[key], after[key]) for key in before)


def test_a_guarded_training_resumes_bit_for_bit(job: TrainJob) -> None:
    whole, cut = (variant(job, name, spike_guard=1.02, steps=30) for name in ("whole", "cut"))
    told: list[Event] = []
    expected = run(whole, told.append)
    assert any(event.type == "warning" for event in told), "nothing stood out, so that nothing is tested"
    run(cut, stop=stop_after(20))
    assert run(cut).losses == expected.losses


# --- when it is enough


def test_the_gain_of_a_straight_line_is_its_slope() -> None:
    assert early_stopping.gain_per_step([5 - 0.25 * i for i in range(40)]) == pytest.approx(0.25)


@given(st.lists(st.floats(0, 10), max_size=31))
def test_nothing_is_said_of_few_losses(losses: list[float]) -> None:
    assert not early_stopping.is_spent(losses, math.inf, early_stopping.window_of(100))


def test_a_training_that_buys_too_little_ends_with_its_model_and_stays_ended(job: TrainJob) -> None:
    spent = variant(job, "spent", steps=80, least_gain=math.inf, phases=STAGED)
    result = run(spent)
    assert (result.finished, result.steps) == (True, 40 + early_stopping.window_of(80))
    assert run(spent).steps == result.steps


def test_an_early_end_looks_at_steps_that_are_alike(job: TrainJob) -> None:
    """Not at those of a dense gate, whose end is a jump; and not for longer than a fifth of those that are, or 32."""
    spent = variant(job, "spent", steps=80, least_gain=math.inf, dense_steps=30)
    assert run(spent).steps == 30 + 32
    long = variant(job, "long", steps=400, least_gain=math.inf, phases=(
        Phase(train="router", share=0.5), Phase(train="all", share=0.5)))
    assert run(long).steps == 200 + 40


def test_a_training_that_buys_enough_goes_on(job: TrainJob) -> None:
    assert run(variant(job, "worth", steps=40, least_gain=-math.inf)).steps == 40
