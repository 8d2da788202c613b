"""Tasks by lm-eval: likelihoods as in our scoring and in lm-eval's model class, counts as in plain arithmetic."""

from __future__ import annotations

import importlib.util
import json
import math
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from moedisco_ray.cli.app import app
from moedisco_ray.core.config import Architecture, Evaluation
from moedisco_ray.models import hf_config, load_model, save_model
from moedisco_ray.models.streamed import open_streamed
from moedisco_ray.stages.corpus import read_unseen
from moedisco_ray.stages.evaluate.stage import judge
from moedisco_ray.stages.scoring import token_nats
from moedisco_ray.stages.text.tokenizer import Encoder, save_trained, train_bpe

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")

LENGTH = 48
CHOICES: list[dict[str, Any]] = [
    {"query": "Question: What falls from clouds?", "choices": ["rain", "a long road", "wooden chairs"], "gold": 0},
    {
        "query": "The lamp was dark, therefore",
        "choices": ["she lit it.", "she sang to the whole town about it."],
        "gold": 0,
    },
    {"query": "Two and two are", "choices": ["four", "five", "six", "seven"], "gold": 0},
    {"query": "A cat that is hungry will", "choices": ["sleep in the sun", "look for food"], "gold": 1},
    {"query": "12", "choices": ["is a number", "is a cat"], "gold": 0},
]
COMPLETIONS = [
    {"context": "the cat sat on the", "continuation": "mat"},
    {"context": "one two three four one two three", "continuation": "four"},
    {"context": "a long context, " * 40 + "and its", "continuation": "end"},
]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with its tokenizer, as a run exports it."""
    directory = tmp_path_factory.mktemp("model")
    texts = [row["query"] + " ".join(row["choices"]) for row in CHOICES] + [row["context"] for row in COMPLETIONS]
    save_trained(train_bpe(texts, 320), directory)
    torch.manual_seed(0)
    sizes = Architecture(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.3,
    )
    encoder = Encoder(directory)
    config = hf_config("qwen3_moe", sizes, encoder.vocab_size, LENGTH, encoder.eos)
    save_model(AutoModelForCausalLM.from_config(config), directory)
    return directory


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("it asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def likelihood(model: Path, context: str, continuation: str) -> tuple[float, bool]:
    """Of a continuation, by nothing but the model's logits."""
    encoder = Encoder(model)
    whole = encoder.encode([context + continuation])[0].tolist()
    count = len(whole) - len(encoder.encode([context])[0])
    ids = torch.tensor([encoder.eos, *whole[-LENGTH:]])
    with torch.no_grad():
        log_LV = load_model(model).eval()(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)[-count:]
    targets_L = ids[-count:]
    return float(log_LV[range(count), targets_L].sum()), bool((log_LV.argmax(-1) == targets_L).all())


@pytest.mark.ecosystem("Use: tasks of lm-eval", "lm-eval")
@needs_harness
def test_the_harness_counts_what_the_logits_say(model: Path, tmp_path: Path, offline: None) -> None:
    files = (write_lines(tmp_path / "facts.jsonl", CHOICES), write_lines(tmp_path / "ends.jsonl", COMPLETIONS))
    found = judge(open_streamed(model, dtype=torch.float32), model, Evaluation(lm_eval=files), read_unseen=read_unseen)
    assert list(found) == ["lm_eval"]
    facts, ends = found["lm_eval"]
    right, right_by_length = [], []
    for row in CHOICES:
        asked = row["query"] + ("\nAnswer:" if row["query"].startswith("Question:") else "")
        nats = np.array([likelihood(model, asked, f" {choice}")[0] for choice in row["choices"]])
        right.append(nats.argmax() == row["gold"])
        right_by_length.append((nats / [len(choice) for choice in row["choices"]]).argmax() == row["gold"])
    assert 0 < sum(right) < len(CHOICES)
    assert (facts["task"], facts["examples"], facts["acc"], facts["acc_norm"]) == (
        "facts",
        len(CHOICES),
        pytest.approx(np.mean(right)),
        pytest.approx(np.mean(right_by_length)),
    )
    assert facts["acc_stderr"] == pytest.approx(np.std(right, ddof=1) / math.sqrt(len(right)))
    assert facts["chance"] == pytest.approx((1 / 3 + 1 / 2 + 1 / 4 + 1 / 2 + 1 / 2) / 5)
    assert (ends["acc"], ends["acc_norm"], ends["chance"]) == (
        np.mean([likelihood(model, row["context"], f" {row['continuation']}")[1] for row in COMPLETIONS]),
        None,
        None,
    )
    streamed, settings = open_streamed(model, dtype=torch.float32), Evaluation(lm_eval=files)
    few = judge(streamed, model, settings, read_unseen=read_unseen, most_examples=1)["lm_eval"]
    assert [entry["examples"] for entry in few] == [1, 1]
    assert few[0]["acc_stderr"] is None


@needs_harness
def test_questions_are_asked_as_their_texts_want() -> None:
    from moedisco_ray.stages.evaluate.harness import pose  # noqa: PLC0415  # slow, and so only here

    def asked(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
        task = pose("t", rows)
        task.build_all_requests()
        return [instance.args for instance in task.instances]

    assert asked(CHOICES[:2]) == [
        *(("Question: What falls from clouds?\nAnswer:", f" {choice}") for choice in CHOICES[0]["choices"]),
        *(("The lamp was dark, therefore", f" {choice}") for choice in CHOICES[1]["choices"]),
    ]
    assert asked(COMPLETIONS[:1]) == [("the cat sat on the", " mat")]


@pytest.mark.ecosystem("Use: tasks of lm-eval", "lm-eval")
@needs_harness
def test_likelihoods_are_those_of_our_scoring_and_of_the_harness_own_class(model: Path, offline: None) -> None:
    from lm_eval.api.instance import Instance  # noqa: PLC0415  # slow, and so only here
    from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

    from moedisco_ray.stages.evaluate.harness import ScoredLM  # noqa: PLC0415

    encoder, loaded = Encoder(model), load_model(model).eval()
    ours = ScoredLM(loaded, encoder.encode, encoder.eos, LENGTH)
    theirs = HFLM(pretrained=loaded, tokenizer=AutoTokenizer.from_pretrained(model), max_length=LENGTH, batch_size=3)
    pairs = [(row["query"], f" {choice}") for row in CHOICES for choice in row["choices"]]
    pairs += [(row["context"], f" {row['continuation']}") for row in COMPLETIONS]
    split = [ours._encode_pair(*pair) for pair in pairs]
    assert max(len(context) for context, _ in split) > LENGTH
    found = ours.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    for (context, continuation), (nats, _) in zip(split, found, strict=True):
        tokens = np.array((context + continuation)[-LENGTH:], dtype=np.int32)
        (alone,) = token_nats(loaded, [tokens], prefix=encoder.prefix, sequence_length=LENGTH)
        assert nats == pytest.approx(-alone[-len(continuation) :].sum(), abs=1e-4)

    # What the model would write is among the rest: one token, then any other.
    for context, continuation in [pair for pair in split if len(pair[0]) < LENGTH - 2]:
        with torch.no_grad():
            written = int(loaded(input_ids=torch.tensor([[encoder.eos, *context]])).logits[0, -1].argmax())
        split += [(context, [written]), ([*context, written], continuation)]
    cut = [((context + continuation)[-LENGTH : -len(continuation)], continuation) for context, continuation in split]
    expected = theirs._loglikelihood_tokens(
        [(("", ""), [encoder.eos, *context], end) for context, end in cut], disable_tqdm=True
    )
    found = ours._loglikelihood_tokens([(("", ""), context, continuation) for context, continuation in split])
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert 0 < sum(greedy for _, greedy in found) < len(found)


@needs_harness
def test_an_exported_model_is_measured_on_its_own(model: Path, tmp_path: Path, offline: None) -> None:
    text = tmp_path / "other.txt"
    text.write_text("the cat sat on the mat, and one two three", encoding="utf-8")
    arguments = [
        "evaluate",
        str(model),
        "--lm-eval",
        str(write_lines(tmp_path / "facts.jsonl", CHOICES)),
        "--sources",
        str(text),
    ]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert shown.stderr == ""
    assert "unseen-0, never trained on" in shown.stdout
    assert "facts" in shown.stdout
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert found["unseen"]["bytes"] == len(text.read_bytes())
    assert found["lm_eval"][0]["examples"] == len(CHOICES)


def test_a_missing_harness_is_told_with_its_remedy(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    tasks = write_lines(tmp_path / "facts.jsonl", CHOICES)
    result = CliRunner().invoke(app, ["evaluate", str(model), "--lm-eval", str(tasks)])
    assert result.exit_code == 2
    assert result.stderr == (
        f"moedisco: evaluation.lm_eval: ['{tasks}']: lm-eval is not installed; pip install 'moedisco-ray[lm-eval]'\n"
    )
