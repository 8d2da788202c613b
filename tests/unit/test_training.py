from __future__ import annotations

import dataclasses
import errno
import functools
import itertools
import json
import math
import shutil
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_training import BATCH, RECIPE, L, V, ignore, never, run, stop_after, variant, weights, write_shard, write_tiny
from training_worker import Counting
from transformers import AutoModelForCausalLM

from moedisco_ray.core.cards import peak_flops
from moedisco_ray.core.config import FAMILIES, FamilyName, Optimizer, read_architecture
from moedisco_ray.core.errors import CorpusError, RunDirError, TrainingError
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.core.records.events import Event
from moedisco_ray.core.store.artifacts import read_json
from moedisco_ray.models import check_same, save_model
from moedisco_ray.packed_tokens import TokenStream, batch_indices, write_conversations, write_index, write_packed
from moedisco_ray.plan.cost import flops_per_token
from moedisco_ray.plan.parameters import count_parameters
from moedisco_ray.training import (
    TrainJob,
    TrainResult,
    World,
    learning_rate,
    metrics,
    read_partial_result,
    results,
    train,
    write_partial_result,
)
from moedisco_ray.training.batches import document_positions
from moedisco_ray.training.checkpoints import checkpoint
from moedisco_ray.training.checkpoints.manifest import HashingStream
from moedisco_ray.training.checkpoints.storage import Storage
from moedisco_ray.training.metrics import TrainingMetrics, job_flops_per_token
from moedisco_ray.training.optimizer import BETAS, DECAY, LARGEST_NORM, RoundingAdamW, adamw
from moedisco_ray.training.sharding import trainable


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("training")
    torch.set_num_threads(1)
    write_shard(home / "shard")
    write_tiny(home / "moe", 4)
    write_tiny(home / "dense", 1)
    write_tiny(home / "tied", 4, tied=True)
    write_tiny(home / "skewed", 4, favourite=0)
    return home


Undisturbed = Callable[[str], tuple[TrainJob, TrainResult]]


def job_in(directory: Path, home: Path) -> TrainJob:
    return TrainJob(
        stage="finetune",
        name="finetune",
        model=home / "moe",
        packed_dirs=(home / "shard",),
        output=directory / "out",
        checkpoints=directory / "steps",
        steps=8,
        sequence_length=L,
        optimizer=RECIPE,
        checkpoint_every=3,
        keep=2,
        seed=5,
        load_balance=0.02,
        z_loss=0.01,
        log_every=2,
    )


@pytest.fixture
def job(home: Path, tmp_path: Path) -> TrainJob:
    return job_in(tmp_path, home)


@pytest.fixture(scope="module")
def undisturbed(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Trains the job to its end with a precision, once. To be read, not written."""

    @functools.cache
    def trained(precision: str) -> tuple[TrainJob, TrainResult]:
        job = job_in(tmp_path_factory.mktemp("undisturbed"), home)
        job = dataclasses.replace(job, optimizer=RECIPE.model_copy(update={"precision": precision}))
        return job, run(job)

    return trained


class Killed(Exception):  # noqa: N818 - what happens to the process, not an error of ours
    pass


def kill_at(step: int) -> Callable[[Event], None]:
    def emit(event: Event) -> None:
        if event.data["step"] >= step:
            raise Killed

    return emit


# --- the schedule


@given(steps=st.integers(1, 500), warmup=st.floats(0, 0.9), schedule=st.sampled_from(["constant", "cosine", "wsd"]))
def test_learning_rate_rises_then_never_rises_again(steps: int, warmup: float, schedule: str) -> None:
    recipe = Optimizer(lr=0.5, warmup=warmup, schedule=schedule)
    rates = [learning_rate(step, steps, recipe) for step in range(steps)]
    assert all(0 < rate <= 0.5 for rate in rates)
    ramp = math.ceil(warmup * steps)
    assert rates[:ramp] == pytest.approx([0.5 * (i + 1) / ramp for i in range(ramp)])
    after = rates[ramp:]
    assert after == sorted(after, reverse=True)
    if after:
        assert after[0] == pytest.approx(0.5)
    if schedule == "constant":
        assert set(after) <= {0.5}
        return
    down = len(after) if schedule == "cosine" else min(len(after), math.ceil(DECAY * steps))
    assert set(after[: len(after) - down]) <= {0.5}
    if down > 1:
        assert after[-1] == pytest.approx(0.05)


def test_the_end_of_wsd_is_a_cosine_of_its_own() -> None:
    whole = Optimizer(lr=1.0, schedule="cosine")
    ends = Optimizer(lr=1.0, schedule="wsd", warmup=0.1)
    assert [learning_rate(80 + step, 100, ends) for step in range(20)] == [
        learning_rate(step, 20, whole) for step in range(20)
    ]


def test_cosine_is_halfway_in_the_middle() -> None:
    assert learning_rate(50, 101, Optimizer(lr=1.0, schedule="cosine")) == pytest.approx(0.55)


@given(steps=st.lists(st.integers(1, 300), min_size=1, max_size=4), warmup=st.floats(0, 0.9))
def test_the_phases_of_a_run_follow_one_cosine(steps: list[int], warmup: float) -> None:
    whole, parts = (Optimizer(lr=0.5, warmup=warmup, schedule=each) for each in ("cosine", "run_cosine"))
    total = sum(steps)
    edges = [sum(steps[:i]) / total for i in range(len(steps) + 1)]
    rates = [
        learning_rate(step, count, parts, span)
        for count, span in zip(steps, itertools.pairwise(edges), strict=True)
        for step in range(count)
    ]
    assert rates == pytest.approx([learning_rate(step, total, whole) for step in range(total)], abs=1e-6)


@given(
    steps=st.integers(1, 300),
    edges=st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda each: abs(each[0] - each[1]) > 1e-3),
    warmup=st.floats(0, 0.9),
)
def test_no_rate_of_a_part_of_a_run_exceeds_the_peak(steps: int, edges: tuple[float, float], warmup: float) -> None:
    recipe, span = Optimizer(lr=0.5, warmup=warmup, schedule="run_cosine"), (min(edges), max(edges))
    assert all(0 < learning_rate(step, steps, recipe, span) <= 0.5 for step in range(steps))


def test_the_last_rate_of_a_run_is_a_tenth_whatever_the_batches() -> None:
    recipe = Optimizer(lr=1.0, schedule="run_cosine")
    assert learning_rate(999, 1000, recipe, (0.95, 1.0)) == pytest.approx(0.1, abs=1e-6)
    assert learning_rate(0, 10, recipe, (0.5, 0.95)) == pytest.approx(0.55, abs=0.05)


# --- the loop


def reference_losses(job: TrainJob, directory: Path) -> list[float]:
    """The same training in plain PyTorch: whole batch at once, unfused AdamW, Hugging Face's own loss."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    trained = [p for name, p in model.named_parameters() if not name.endswith("mlp.gate.weight") or len(p) > 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": job.optimizer.weight_decay},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=BETAS,
        foreach=False,
    )
    stream = TokenStream(job.packed_dirs, L)
    losses = []
    fractions = torch.full((2, 4), 0.5)
    for step in range(job.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, job.steps, job.optimizer)
        chosen = [int(i) for i in batch_indices(job.seed, step, BATCH, len(stream))]
        rows = torch.from_numpy(np.stack([stream.window(i) for i in chosen]))
        counts = torch.from_numpy(np.stack([stream.loss_mask(i) for i in chosen]))
        out = model(input_ids=rows[:, :-1], output_router_logits=job.load_balance > 0, use_cache=False)
        targets = rows[:, 1:].masked_fill(~counts, -100).flatten()
        loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets)
        total = loss
        if job.load_balance:
            chosen = [logits.softmax(-1).topk(2).indices for logits in out.router_logits]
            for layer, logits in enumerate(out.router_logits):
                balance = 4 * (fractions[layer] * logits.softmax(-1).mean(0)).sum()
                total = total + (job.load_balance * balance + job.z_loss * logits.logsumexp(-1).square().mean()) / 2
            fractions = torch.stack([torch.bincount(c.flatten(), minlength=4) / len(c) for c in chosen])
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(trained, LARGEST_NORM)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_equals_a_plain_pytorch_loop_step_by_step_on_a_moe(undisturbed: Undisturbed) -> None:
    job, result = undisturbed("auto")
    assert result.losses == pytest.approx(reference_losses(job, job.model), rel=1e-5)


def write_answers(directory: Path, mask: NDArray[np.bool_]) -> None:
    """Write 100 conversations, each as long as a window; the loss counts the tokens of the mask."""
    directory.mkdir()
    ids, lengths, path = np.arange(len(mask)) % (V - 1) + 1, np.full(100, L + 1), directory / "part-00000.npy"
    write_index(directory, [write_conversations(path, ids, mask, lengths, length=L, vocab_size=V)], V, L)


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_equals_a_plain_pytorch_loop_where_the_loss_leaves_out_tokens(
    job: TrainJob, home: Path, micro_batch: int | None
) -> None:
    path = home / f"masked-{micro_batch}"
    write_answers(path, np.random.default_rng(0).uniform(size=100 * (L + 1)) < 0.3)
    masked = variant(
        job, path.name, packed_dirs=(path,), optimizer=job.optimizer.model_copy(update={"micro_batch": micro_batch})
    )
    assert run(masked).losses == pytest.approx(reference_losses(masked, job.model), rel=1e-5)


def test_an_expert_whose_tokens_the_loss_leaves_out_is_no_error(job: TrainJob, home: Path) -> None:
    """Experts of the last layer get no gradient from them."""
    path = home / "mostly-masked"
    write_answers(path, np.arange(100 * (L + 1)) % (L + 1) == 9)
    masked = variant(job, path.name, packed_dirs=(path,), steps=1)
    assert run(masked).losses == pytest.approx(reference_losses(masked, job.model), rel=1e-5)


def test_equals_a_plain_pytorch_loop_on_a_one_expert_submodel(job: TrainJob, home: Path) -> None:
    dense = dataclasses.replace(job, model=home / "dense", load_balance=0.0, z_loss=0.0)
    assert run(dense).losses == pytest.approx(reference_losses(dense, home / "dense"), rel=1e-5)
    before, after = weights(home / "dense"), weights(dense.output)
    gates = [key for key in before if key.endswith("mlp.gate.weight")]
    assert len(gates) == 2
    assert all(torch.equal(before[key], after[key]) for key in gates), "weight decay shrank a router without gradient"
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_learns_and_reports(job: TrainJob) -> None:
    events: list[Event] = []
    job = dataclasses.replace(job, steps=41, log_every=10, checkpoint_every=100)
    result = run(job, events.append)
    assert result.finished
    assert (result.steps, result.tokens, len(result.losses), result.restored_step) == (41, 41 * BATCH * L, 41, 0)
    assert result.loss == pytest.approx(np.mean(result.losses[-2:]))
    assert result.loss < result.losses[0] - 0.5
    saved = events.pop()
    assert (saved.type, saved.data["step"]) == ("checkpoint", 41)
    assert 0 < saved.data["stall"] <= saved.data["latency"]
    assert [(e.type, e.stage, e.unit, e.data["step"]) for e in events] == [
        ("progress", "finetune", "finetune", step) for step in (10, 20, 30, 40, 41)
    ]
    assert [e.data["loss"] for e in events] == pytest.approx(
        [np.mean(result.losses[i : min(i + 10, 41)]) for i in range(0, 41, 10)]
    )
    balance = {"largest_load", "dead_experts"}
    assert (
        set(events[0].data) == {"step", "steps", "tokens", "loss", "lr", "grad_norm", "tokens_per_second"} | balance
    ), "no MFU"
    assert all(
        math.isfinite(value) and (value > 0 or name == "dead_experts") for e in events for name, value in e.data.items()
    )


def test_output_is_a_hugging_face_directory_in_classic_names(job: TrainJob) -> None:
    run(job)
    keys = set(weights(job.output))
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in keys
    assert keys == set(weights(job.model))
    assert [p.name for p in job.output.parent.iterdir() if p.name.startswith(".")] == []


def test_a_tied_head_is_written_once(job: TrainJob, home: Path) -> None:
    run(dataclasses.replace(job, model=home / "tied", steps=2))
    written = weights(job.output)
    assert "lm_head.weight" not in written
    assert not torch.equal(written["model.embed_tokens.weight"], weights(home / "tied")["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch": 1},
        {"micro_batch": 4},
        {"gradient_checkpointing": True},
        {"micro_batch": 4, "gradient_checkpointing": True},
    ],
)
def test_neither_micro_batch_nor_checkpointing_changes_the_result(
    job: TrainJob, undisturbed: Undisturbed, changes: dict[str, Any]
) -> None:
    whole, result = undisturbed("auto")
    parts = variant(job, "parts", optimizer=RECIPE.model_copy(update=changes))
    assert run(parts).losses == pytest.approx(result.losses, rel=1e-5)
    torch.testing.assert_close(weights(parts.output), weights(whole.output), rtol=1e-3, atol=2e-5)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.sampled_from([family for family in FAMILIES if DECLARATIONS[family].recurrence is None]),
)
@settings(max_examples=12, deadline=None)
def test_tokens_of_packed_documents_see_their_own_document_only(lengths: list[int], family: FamilyName) -> None:
    start = 0
    random = np.random.default_rng(sum(lengths))
    documents = [torch.tensor([start, *random.integers(1, V, length)]) for length in lengths]
    with tempfile.TemporaryDirectory() as directory:
        write_tiny(Path(directory), 4, family=family)
        model = trainable(Path(directory), RECIPE, World())
    packed_L = torch.cat(documents)
    inputs_BL, targets_BL = packed_L[None, :-1], packed_L[None, 1:].masked_fill(packed_L[None, 1:] == start, -100)
    positions_BL = document_positions(inputs_BL == start)
    assert positions_BL.flatten().tolist() == [place for document in documents for place in range(len(document))][:-1]
    together = model(inputs_BL, targets_BL, positions_BL)
    apart = sum(model(document[None, :-1], document[None, 1:]) for document in documents)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


def test_hiding_other_documents_changes_the_training_as_a_setting_of_the_job(
    job: TrainJob, undisturbed: Undisturbed
) -> None:
    within = job.optimizer.model_copy(update={"within_documents": True})
    assert run(variant(job, "within", optimizer=within)).losses != undisturbed("auto")[1].losses


def test_the_router_losses_change_the_training(job: TrainJob, undisturbed: Undisturbed) -> None:
    with_losses = undisturbed("auto")[1].losses
    assert run(variant(job, "without", load_balance=0.0)).losses != with_losses
    assert run(variant(job, "no-z", z_loss=0.0)).losses != with_losses


def test_load_balance_balances(job: TrainJob, home: Path) -> None:
    job = dataclasses.replace(job, model=home / "skewed", steps=80, checkpoint_every=100)
    spread = []
    for name, weight in (("none", 0.0), ("some", 0.05)):
        trial = variant(job, name, load_balance=weight)
        run(trial)
        progress = read_json(trial.checkpoints / f"step-{trial.steps:07d}" / "progress.json")
        fractions = np.array(progress["fractions_NE"])
        spread.append(fractions.std())
    assert spread[1] < 0.6 * spread[0], spread


# --- interruptions


@pytest.mark.parametrize("precision", ["auto", "pure_bf16"])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(
    job: TrainJob, undisturbed: Undisturbed, step: int, precision: str
) -> None:
    other, whole = undisturbed(precision)
    job = dataclasses.replace(job, optimizer=other.optimizer)
    halted = run(job, stop=stop_after(step))
    assert (halted.finished, halted.steps, job.output.exists()) == (False, step, False)
    assert halted.losses == whole.losses[:step]
    resumed = run(job)
    assert (resumed.finished, resumed.restored_step, resumed.losses) == (True, step, whole.losses)
    check_same(weights(job.output), weights(other.output))


@pytest.mark.parametrize("noise", ["attention_dropout", "router_jitter_noise"])
def test_noise_that_a_checkpoint_asks_for_is_left_out_but_kept_in_its_settings(
    job: TrainJob, home: Path, noise: str
) -> None:
    write_tiny(home / noise, 4, family="mixtral")
    plain = variant(job, f"without-{noise}", model=home / noise, steps=4)
    run(plain)
    path = home / noise / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {noise: 0.2}), encoding="utf-8")
    noisy = variant(job, noise, model=home / noise, steps=4)
    run(noisy)
    check_same(weights(noisy.output), weights(plain.output))
    assert json.loads((noisy.output / "config.json").read_text())[noise] == 0.2


def test_time_in_which_the_held_out_loss_is_measured_is_no_training_time(
    job: TrainJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock advances in measurements alone."""
    clock = [0.0]

    @dataclasses.dataclass(frozen=True)
    class Slow(Counting):
        def batches(self, batch_tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            clock[0] += 100.0
            return super().batches(batch_tokens)

    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    assert run(dataclasses.replace(job, held_out=Slow(every=2), log_every=3)).seconds == 0
    assert clock[0] == 100.0 * math.ceil(job.steps / 2)


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(job: TrainJob, undisturbed: Undisturbed) -> None:
    other, whole = undisturbed("auto")
    with pytest.raises(Killed):
        run(dataclasses.replace(job, log_every=1), kill_at(5))
    resumed = run(job)
    assert (resumed.restored_step, resumed.losses) == (3, whole.losses)
    check_same(weights(job.output), weights(other.output))


def test_each_step_is_told_before_it_is_made_so_that_an_error_has_one(job: TrainJob) -> None:
    asked = itertools.count(1)

    def fails_after_the_fifth() -> bool:
        if next(asked) == 5:
            raise Killed
        return False

    first, second = list[int | None](), list[int | None]()
    with pytest.raises(Killed):
        train(job, World(), ignore, fails_after_the_fifth, first.append)
    # Each is followed by its end, and the error is of the fifth, whose checkpoint is not saved.
    assert first == [0, None, 1, None, 2, None, 3, None, 4, None]
    train(job, World(), ignore, never, second.append)
    assert second == [3, None, 4, None, 5, None, 6, None, 7, None]


def test_a_finished_training_is_not_done_again(job: TrainJob) -> None:
    first = run(job)
    again = run(job)
    assert (again.restored_step, again.losses, again.seconds) == (job.steps, first.losses, first.seconds)
    check_same(weights(job.output), weights(job.output))


def test_keeps_the_newest_checkpoints_and_trusts_only_whole_ones(job: TrainJob) -> None:
    run(job)
    assert sorted(p.name for p in job.checkpoints.iterdir()) == ["step-0000006", "step-0000008"]
    (job.checkpoints / ".step-0000009.draft").mkdir()
    (job.checkpoints / "step-0000010").mkdir()  # no manifest: someone's half-made copy
    assert checkpoint.latest(job.checkpoints) == 8
    shutil.rmtree(job.checkpoints / "step-0000008")
    assert checkpoint.latest(job.checkpoints) == 6
    assert checkpoint.latest(job.checkpoints / "absent") is None


@pytest.mark.parametrize("file", ["__0_0.distcp", "metadata.json", "progress.json", "manifest.json"])
def test_a_full_disk_is_told_and_leaves_nothing_behind(
    job: TrainJob, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    writing = Storage.writing

    def full(storage: Storage, path: str) -> AbstractContextManager[HashingStream]:
        if path.endswith(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        return writing(storage, path)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "writing", full)
        with pytest.raises(RunDirError, match="the disk is full"):
            run(job)
    assert list(job.checkpoints.iterdir()) == []
    assert run(job).finished


@pytest.mark.parametrize("steps", [2, 8])  # the last step's gradient alone, which no later loss would betray
def test_an_overflow_names_its_step_and_saves_nothing(job: TrainJob, steps: int) -> None:
    wild = dataclasses.replace(job, steps=steps, optimizer=Optimizer(lr=1e30, batch_tokens=BATCH * L), log_every=100)
    with pytest.raises(TrainingError, match=r"finetune: the norm of the gradient of step 2 is (inf|nan); lower the"):
        run(wild)
    assert checkpoint.latest(job.checkpoints) is None
    assert not job.output.exists()


def test_a_loss_that_is_not_finite_names_its_step(job: TrainJob, home: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(home / "moe")
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    save_model(model, tmp_path / "nan")
    with pytest.raises(TrainingError, match=r"finetune: the loss of step 1 is nan"):
        run(dataclasses.replace(job, model=tmp_path / "nan"))


def test_a_shard_without_a_whole_sequence_is_told(job: TrainJob, tmp_path: Path) -> None:
    write_packed(tmp_path / "short", [[np.arange(1, 5)]], 0, V)
    with pytest.raises(CorpusError, match="sequence_length"):
        run(dataclasses.replace(job, packed_dirs=(tmp_path / "short",)))


# --- bf16


def test_bf16_precision_stays_near_fp32(job: TrainJob, undisturbed: Undisturbed) -> None:
    exact = undisturbed("auto")[1].losses
    rough = run(variant(job, "rough", optimizer=RECIPE.model_copy(update={"precision": "bf16"}))).losses
    assert rough != exact
    assert rough == pytest.approx(exact, rel=0.02)


def test_bf16_state_takes_8_bytes_per_parameter_and_learns_like_fp32(job: TrainJob) -> None:
    job = dataclasses.replace(job, steps=40, checkpoint_every=100)
    exact = run(job)
    recipe = RECIPE.model_copy(update={"precision": "pure_bf16"})
    small = run(variant(job, "small", optimizer=recipe))
    assert small.loss == pytest.approx(exact.loss, rel=0.03)
    model = trainable(job.model, recipe, World())
    optimizer = adamw([{"params": list(model.parameters())}], recipe, 0)
    ones = torch.ones(1, L, dtype=torch.long)
    model(ones, ones).backward()
    optimizer.step()
    held = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values()) if t.ndim]
    assert sum(t.nbytes for t in held) == 8 * sum(p.numel() for p in model.parameters())


def test_rounding_adamw_follows_torch_in_the_mean() -> None:
    # Updates of 1e-4 on weights near 1, where bf16 has a spacing of 1/128: rounding to nearest would never move.
    start = torch.full((20_000,), 1.0)
    exact, rounded = start.clone().requires_grad_(), start.bfloat16().requires_grad_()
    reference = torch.optim.AdamW([exact], lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    ours = RoundingAdamW([rounded], lr=1e-4, weight_decay=0.1, seed=3)
    for step in range(30):
        gradient = torch.randn(1, generator=torch.Generator().manual_seed(step)).abs().bfloat16()
        exact.grad = gradient.float().expand_as(exact).clone()
        rounded.grad = gradient.expand_as(rounded).clone()
        reference.step()
        ours.step()
    moved = (1 - exact.detach()).mean()
    assert moved > 2e-3
    assert (1 - rounded.detach().float()).mean() == pytest.approx(moved.item(), rel=0.05)
    assert ours.state[rounded]["exp_avg_sq"].float().mean() == pytest.approx(
        reference.state[exact]["exp_avg_sq"].mean().item(), rel=0.01
    )


def test_rounding_is_a_function_of_seed_step_and_rank() -> None:
    def result(seed: int, rank: int) -> torch.Tensor:
        weight = torch.ones(1000, dtype=torch.bfloat16, requires_grad=True)
        optimizer = RoundingAdamW([weight], lr=1e-3, seed=seed, rank=rank)
        for _ in range(2):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        return weight.detach()

    assert torch.equal(result(0, 0), result(0, 0))
    assert not torch.equal(result(0, 0), result(1, 0))
    assert not torch.equal(result(0, 0), result(0, 1))


# --- where a training stands


@pytest.mark.parametrize("precision", ["auto", "pure_bf16"])
@pytest.mark.parametrize("model", ["moe", "tied"])
def test_the_model_of_a_checkpoint_is_what_the_training_would_have_written(
    job: TrainJob, home: Path, precision: str, model: str
) -> None:
    optimizer = job.optimizer.model_copy(update={"precision": precision, "schedule": "constant"})
    job = dataclasses.replace(
        job, model=home / model, optimizer=optimizer, load_balance=0.0, z_loss=0.0, with_optimizer_state=True
    )
    whole = variant(job, "whole", steps=4, checkpoint_every=2)
    result = run(whole)
    assert read_partial_result(whole) == dataclasses.replace(result, restored_step=4)
    part = dataclasses.replace(whole, output=job.output, steps=9)
    assert read_partial_result(part) == dataclasses.replace(result, restored_step=4, finished=False)
    write_partial_result(part)
    files = {path.relative_to(whole.output) for path in whole.output.rglob("*") if path.is_file()}
    assert {path.relative_to(part.output) for path in part.output.rglob("*") if path.is_file()} == files
    assert all((part.output / file).read_bytes() == (whole.output / file).read_bytes() for file in files)


def test_a_finished_training_keeps_its_result_and_no_checkpoints(job: TrainJob) -> None:
    job = dataclasses.replace(job, steps=4, checkpoint_every=2, drop_checkpoints=True)
    result = run(job)
    assert checkpoint.steps(job.checkpoints) == []
    assert read_partial_result(job) == result
    before = {path: path.stat().st_mtime_ns for path in job.output.rglob("*")}
    assert run(job) == result  # a driver that starts again
    assert {path: path.stat().st_mtime_ns for path in job.output.rglob("*")} == before


@pytest.mark.parametrize("dies_in", ["write_json", "rename"])
def test_a_training_that_dies_before_its_record_is_complete_resumes(
    job: TrainJob, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    job = dataclasses.replace(job, steps=4, checkpoint_every=2, drop_checkpoints=True)
    expected = run(variant(job, "other", drop_checkpoints=False))
    with monkeypatch.context() as patched:
        if dies_in == "rename":
            patched.setattr(Path, "rename", _die)
        else:
            patched.setattr(results, "write_json", _die)
        with pytest.raises(KeyboardInterrupt):
            run(job)
    assert checkpoint.latest(job.checkpoints) == 4
    again = run(job)
    assert again.losses == expected.losses
    assert (again.finished, again.restored_step) == (True, 4)
    check_same(weights(job.output), weights(variant(job, "other").output))
    assert checkpoint.steps(job.checkpoints) == []


def _die(*_: object) -> None:
    raise KeyboardInterrupt


def test_without_a_checkpoint_it_stands_where_it_starts(job: TrainJob) -> None:
    assert read_partial_result(job) == TrainResult(0, 0, (), 0.0, 0, finished=False)
    write_partial_result(job)
    check_same(weights(job.output), weights(job.model))


def test_mfu_is_the_share_of_the_cards_peak(job: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    flops = job_flops_per_token(job)
    architecture = read_architecture(job.model, "qwen3_moe")
    assert flops == flops_per_token(
        count_parameters("qwen3_moe", architecture, V), architecture, job.sequence_length, checkpointing=False
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    events: list[Event] = []
    progress = checkpoint.Progress()
    metrics = TrainingMetrics(job, World(size=2, device="cuda:0"), events.append, progress)
    progress.step, progress.losses = 1, [1.0]
    metrics.log(0.1)
    data = events[0].data
    assert data["mfu"] == pytest.approx(data["tokens_per_second"] * flops / (2 * 312e12))


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA A10G", 70),
        ("Tesla T4", 65),
        ("NVIDIA RTX A6000", 155),
    ],
)
def test_peaks_are_those_of_the_data_sheets(name: str, tflops: float) -> None:
    assert peak_flops(name) == tflops * 1e12
    assert peak_flops("Card of the future") is None


@pytest.mark.parametrize("name", ["NVIDIA RTX A4000", "NVIDIA RTX A1000", "NVIDIA T400"])
def test_a_card_whose_name_contains_anothers_has_no_known_peak(name: str) -> None:
    assert peak_flops(name) is None
