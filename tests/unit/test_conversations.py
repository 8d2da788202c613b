"""Conversations are whole in their window, and each is trained on as if it were alone."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_training import BATCH, RECIPE, L, V, ignore, never, run, stop_after, variant, weights, write_shard, write_tiny
from transformers import AutoModelForCausalLM

from moedisco_ray.core.config import check_config
from moedisco_ray.core.config.derived import with_conversations_apart as planned
from moedisco_ray.core.errors import CorpusError
from moedisco_ray.core.store.artifacts import read_json, write_json
from moedisco_ray.models import check_same
from moedisco_ray.packed_tokens import Piece, TokenStream, write_conversations, write_index
from moedisco_ray.stages.corpus import build
from moedisco_ray.stages.text.given_tokens import GivenTokens
from moedisco_ray.training import TrainJob, World, train
from moedisco_ray.training.batches import Batches, MicroBatch
from moedisco_ray.training.conversations import with_conversations_apart
from moedisco_ray.training.sharding import trainable
from moedisco_ray.training.stepper import ResidentStepper
from tests.unit.chat_data import CHATML, conversation, write_rows, write_tokenizer

Talk = tuple[list[int], list[bool]]
LENGTH = 128


@pytest.mark.parametrize("family", CHATML)
def test_windows_hold_whole_conversations_as_the_template_ends_them(tmp_path: Path, family: str) -> None:
    """Neither an end token inside a conversation nor one at its end makes another document."""
    template, special = CHATML[family]
    tokenizer = write_tokenizer(tmp_path / "tokenizer", template, special=special)
    talks = [conversation(number) for number in range(200)]
    path = write_rows(tmp_path / "chat.jsonl", "messages", talks)
    config = check_config(
        {
            "name": "chat",
            "output": str(tmp_path / "runs"),
            "corpus": {"sources": [{"path": str(path), "messages_column": "messages"}], "sequence_length": LENGTH},
            "tokenizer": {"path": str(tmp_path / "tokenizer")},
            "model": {"family": "qwen3_moe"},
            "tokens": {"total": 10**6},
            "finetune": {"optimizer": {"within_documents": True}},
            "pools": {"low_memory": {}, "high_memory": {}},
        }
    )
    assert planned(config, config.submodels.optimizer).within_documents
    (tmp_path / "corpus").mkdir()
    summary = build(config, tmp_path / "corpus")
    made = GivenTokens(tmp_path / "tokenizer")
    whole = {tuple(document.tokens[: LENGTH + 1].tolist()) for talk in talks for document in made.conversation(talk)}
    stream, found = TokenStream([tmp_path / "corpus" / "shards"], LENGTH), list[tuple[int, ...]]()
    for i in range(len(stream)):
        tokens, rest = stream.window(i).tolist(), stream.filled(i)
        while rest:
            found += [talk for talk in whole if tuple(tokens[:rest][-len(talk) :]) == talk][:1]
            rest -= len(found[-1])
        assert not stream.loss_mask(i)[stream.filled(i) - 1 :].any()
    assert len(found) == len(set(found)) == summary["documents"] > 100
    assert summary["cut_conversations"] == sum(len(talk) > LENGTH for talk in found)
    assert any("tokens are not trained on" in warning for warning in summary["warnings"])
    assert all(talk.count(tokenizer.eos_token_id) >= 1 for talk in found)


@pytest.mark.parametrize("pieces", [1, 64])
@pytest.mark.parametrize("length", [2048, 8192])
def test_less_than_3_percent_of_10_000_conversations_is_padding(tmp_path: Path, length: int, pieces: int) -> None:
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(400), 0.9, 10_000), 20, 10**5).astype(np.int64)
    written: list[Piece] = []
    for number, part in enumerate(np.array_split(lengths, pieces)):
        ids = np.ones(part.sum(), dtype=np.int32)
        path = tmp_path / f"part-{number:05d}.npy"
        written.append(write_conversations(path, ids, ids > 0, part, length=length, vocab_size=9))
    index = write_index(tmp_path, written, 9, length)
    assert index["documents"] == len(lengths)
    assert index["tokens"] == np.minimum(lengths, length + 1).sum()
    assert sum(piece.left_out for piece in written) == lengths.sum() - index["tokens"]
    windows = len(TokenStream([tmp_path], length))
    assert 1 - index["tokens"] / (windows * (length + 1)) < 0.03


# --- trainings


def talks_of(count: int) -> list[Talk]:
    random = np.random.default_rng(3)
    lengths = random.integers(2, L + 2, count).tolist()
    return [
        (random.integers(0, V, length).tolist(), [False, True, *(random.uniform(size=length - 2) < 0.5).tolist()])
        for length in lengths
    ]


def flat(lists: list[list[int]] | list[list[bool]]) -> NDArray[np.generic]:
    return np.array(list(itertools.chain(*lists)))


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    talks, directory = talks_of(60), tmp_path / "talks"
    directory.mkdir()
    ids, mask = flat([tokens for tokens, _ in talks]), flat([counts for _, counts in talks]).astype(np.bool_)
    lengths = np.array([len(tokens) for tokens, _ in talks])
    piece = write_conversations(directory / "part-00000.npy", ids, mask, lengths, length=L, vocab_size=V)
    write_index(directory, [piece], V, L)
    write_tiny(tmp_path / "moe", 4, family="qwen2_moe")
    return TrainJob(
        stage="finetune",
        name="talks",
        model=tmp_path / "moe",
        packed_dirs=(directory,),
        output=tmp_path / "out",
        checkpoints=tmp_path / "steps",
        steps=6,
        sequence_length=L,
        optimizer=RECIPE,
        checkpoint_every=2,
        seed=5,
        load_balance=0.02,
        z_loss=0.01,
        log_every=2,
    )


def batch_of(job: TrainJob, world: World, step: int = 0) -> list[MicroBatch]:
    with Batches(job, world) as batches:
        return list(batches(step))


def test_the_loss_is_that_of_conversations_alone(job: TrainJob) -> None:
    windows = len(TokenStream(job.packed_dirs, L))
    assert windows < 60
    recipe = RECIPE.model_copy(update={"batch_tokens": windows * L, "micro_batch": 4})
    whole = with_conversations_apart(dataclasses.replace(job, optimizer=recipe, steps=1))
    stepper = ResidentStepper(trainable(whole.model, whole.optimizer, World()), whole, World())
    loss_sum, _, counted = stepper(batch_of(whole, World()))
    alone = AutoModelForCausalLM.from_pretrained(whole.model, dtype=torch.float32)
    expected, total = 0.0, 0
    routed = torch.zeros(2, 4)
    with torch.no_grad():
        for tokens, counts in talks_of(60):
            out = alone(torch.tensor([tokens[:-1]]), output_router_logits=True, use_cache=False)
            chosen = torch.tensor(counts[1:])
            nats = torch.nn.functional.cross_entropy(out.logits[0], torch.tensor(tokens[1:]), reduction="none")
            expected, total = expected + nats[chosen].sum().item(), total + int(chosen.sum())
            for layer, logits in enumerate(out.router_logits):
                routed[layer] += torch.bincount(logits.topk(2).indices.flatten(), minlength=4)
    assert counted == total
    assert loss_sum.item() / counted == pytest.approx(expected / total, rel=1e-5)
    # Packing also routes the last token of each conversation, which predicts nothing, but no padding.
    torch.testing.assert_close(stepper.fractions_NE.sum(dim=1), torch.full((2,), 2.0))
    torch.testing.assert_close(stepper.fractions_NE, routed / routed.sum(dim=1, keepdim=True) * 2, atol=0.1, rtol=0)


@pytest.mark.parametrize("size", [2, 4])
def test_workers_get_the_parts_of_one_batch(job: TrainJob, size: int) -> None:
    apart = with_conversations_apart(job)
    (whole,) = batch_of(apart, World(), 1)
    parts = [batch_of(apart, World(rank=rank, size=size), 1)[0] for rank in range(size)]
    for name in ("inputs_BL", "targets_BL", "positions_BL"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts])[:BATCH], getattr(whole, name)), name
    weights_T, *others = (each.weights_T for each in (whole, *parts))
    joined = torch.cat(
        [torch.ones(each.inputs_BL.numel()) if w is None else w for each, w in zip(parts, others, strict=True)]
    )
    assert torch.equal(joined[: BATCH * L], torch.ones(BATCH * L) if weights_T is None else weights_T)
    assert joined.sum() == pytest.approx(BATCH * L)
    assert {part.loss_tokens for part in parts} == {whole.loss_tokens}


def test_a_resumed_training_equals_an_uninterrupted_one_bit_for_bit(job: TrainJob) -> None:
    whole, parts = variant(job, "whole"), variant(job, "parts")
    uninterrupted = run(whole)
    assert train(parts, World(), ignore, stop_after(3)).steps == 3
    resumed = train(parts, World(), ignore, never)
    assert (resumed.restored_step, resumed.losses) == (3, uninterrupted.losses)
    check_same(weights(parts.output), weights(whole.output))
    within = variant(job, "within", optimizer=RECIPE.model_copy(update={"within_documents": True}))
    assert run(within).losses == uninterrupted.losses, "conversations are apart without the setting, too"


def test_recurrent_layers_train_on_whole_windows(job: TrainJob, tmp_path: Path) -> None:
    write_tiny(tmp_path / "recurrent", 4, family="qwen3_next")
    recurrent = dataclasses.replace(job, model=tmp_path / "recurrent", steps=1)
    assert with_conversations_apart(recurrent) is recurrent
    assert np.isfinite(run(recurrent).losses).all()


def test_text_that_an_earlier_release_packed_trains_as_before(job: TrainJob, tmp_path: Path) -> None:
    write_shard(tmp_path / "shard")
    text = dataclasses.replace(job, packed_dirs=(tmp_path / "shard",))
    expected = run(variant(text, "now")).losses
    for path in (tmp_path / "shard").glob("*.starts"):
        path.unlink()
    index = read_json(tmp_path / "shard" / "index.json")
    del index["version"]
    write_json(tmp_path / "shard" / "index.json", index)
    assert run(variant(text, "before")).losses == expected
    within = RECIPE.model_copy(update={"within_documents": True})
    with pytest.raises(CorpusError, match=r"within_documents: needs .* remove the folders corpus and clusters"):
        run(variant(text, "within", optimizer=within))
