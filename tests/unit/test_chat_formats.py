"""ShareGPT's, OpenAI's and Alpaca's rows become messages that chat templates take; nothing is dropped silently."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moedisco_ray.core.config import check_config
from moedisco_ray.core.errors import CorpusError, UserError
from moedisco_ray.stages.corpus.build import build
from moedisco_ray.stages.corpus.probe import probe
from moedisco_ray.stages.text.cutting import GivenTokensError
from moedisco_ray.stages.text.given_tokens import GivenTokens
from moedisco_ray.stages.text.messages import alpaca, talk_of, tools_of
from tests.unit.chat_data import PLAIN_TURNS, TURNS, conversation, write_tokenizer

ASKED = {"role": "user", "content": "what is the sum?"}
CALL = {"type": "function", "function": {"name": "sum", "arguments": {"a": 1}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RETURNED = {"role": "tool", "content": "3"}
ANSWERED = {"role": "assistant", "content": "it is 3"}


def test_sharegpt_and_openai_messages_mean_the_same() -> None:
    sharegpt = [
        {"from": "system", "value": "be brief"},
        {"from": "human", "value": "what is the sum?"},
        {"from": "function_call", "value": json.dumps({"name": "sum", "arguments": {"a": 1}})},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "it is 3"},
    ]
    text_call = {"id": "1", "type": "function", "function": {"name": "sum", "arguments": json.dumps({"a": 1})}}
    openai = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "what is "}, {"type": "text", "text": "the sum?"}]},
        {"role": "assistant", "content": None, "tool_calls": [text_call]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        {"role": "assistant", "content": "it is 3", "weight": 0},
    ]
    earlier = {"role": "assistant", "content": None, "function_call": {"name": "sum", "arguments": '{"a": 1}'}}
    expected = [{"role": "system", "content": "be brief"}, ASKED, CALLED, RETURNED, ANSWERED]
    assert talk_of(sharegpt).messages == expected
    assert talk_of(sharegpt).trained == [False, False, True, False, True]
    assert talk_of(sharegpt, train_on="last").trained == [False] * 4 + [True]
    assert talk_of(sharegpt[1:], system="be brief").messages == expected
    found = talk_of(openai)
    (call,) = found.messages[2]["tool_calls"]
    assert (call.pop("id"), call) == ("1", CALL)
    assert found.trained == [False, False, True, False, False], "weight: 0 is not trained on"
    assert talk_of([ASKED, earlier]).messages == [ASKED, CALLED]
    assert tools_of([{"name": "sum"}]) == [{"type": "function", "function": {"name": "sum"}}]


def test_alpaca_rows_are_conversations(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, PLAIN_TURNS)
    row = {"task": "add", "input": "1 and 2", "output": "3", "system": "be brief", "history": [["hello", "yes?"]]}
    said = [("user", "hello"), ("assistant", "yes?"), ("user", "add\n1 and 2"), ("assistant", "3")]
    messages = [{"role": role, "content": text} for role, text in said]
    assert alpaca(row, "task") == messages
    assert alpaca({"task": "add", "input": "", "output": "3", "history": None}, "task")[0]["content"] == "add"
    made = GivenTokens(tmp_path)
    (one,) = made.instruction(row, "task")
    (other,) = made.conversation([{"role": "system", "content": "be brief"}, *messages])
    assert (one.text, one.loss_mask.tolist()) == (other.text, other.loss_mask.tolist())
    (last,) = made.instruction(row, "task", train_on="last")
    assert 0 < last.loss_mask.sum() < one.loss_mask.sum()
    for wrong in ({"task": "a", "output": None}, {"task": "a", "output": "b", "history": ["c"]}, {"task": 1}):
        with pytest.raises(GivenTokensError):
            list(made.instruction(wrong, "task"))


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "critic", "content": "a"}, "the role 'critic'"),
        ({"from": "gpt5", "value": "a"}, "the role 'gpt5'"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "a"}]}, "a part of the type 'image_url'"),
        ({"role": "user", "content": {"a": 1}}, "the content of a message is a dict"),
        ({"role": "user"}, "a message has no content"),
        ({"from": "function_call", "value": "sum(1)"}, "is not JSON"),
        ({"role": "assistant", "content": "", "tool_calls": [{"arguments": {}}]}, "has no name"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "the weight 0.5"),
    ],
)
def test_what_has_no_meaning_is_refused_in_one_line(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(GivenTokensError, match=reason) as failed:
        talk_of([message])
    assert "\n" not in str(failed.value)
    assert talk_of([{"role": "critic", "content": "a"}], "{% if m.role == 'critic' %}").messages


def test_what_a_template_leaves_out_is_refused_or_named(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "chat", TURNS)
    write_tokenizer(tmp_path / "silent", PLAIN_TURNS.replace("{{- message.content + '<|im_end|>", "{{- '<|im_end|>"))
    made = GivenTokens(tmp_path / "chat")
    with pytest.raises(GivenTokensError, match="leaves out a call"):
        list(made.conversation([ASKED, CALLED, RETURNED, ANSWERED]))
    with pytest.raises(GivenTokensError, match="leaves out the text of a message with the role 'user'"):
        list(GivenTokens(tmp_path / "silent").conversation([ASKED, ANSWERED]))
    found = talk_of([ASKED, {**ANSWERED, "mood": "good", "reasoning_content": "a"}], TURNS)
    assert found.unread == {"mood", "reasoning_content"}


def corpus(home: Path, rows: list[dict[str, Any]], template: str = TURNS, **source: Any) -> dict[str, Any]:
    write_tokenizer(home / "tokenizer", template)
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = check_config(
        {
            "name": "a",
            "corpus": {
                "sources": [{"path": str(home / "rows.jsonl"), "name": "chats", **source}],
                "sequence_length": 64,
                "validation_fraction": 0.3,
            },
            "tokenizer": {"path": str(home / "tokenizer")},
            "model": {"family": "qwen3_moe"},
            "clusters": {"count": 2},
            "tokens": {"total": 10**6},
            "output": str(home / "runs"),
        }
    )
    found = probe(config)
    if found.problems:
        raise found.problems[0]
    (home / "corpus").mkdir()
    return {"probe": found, **build(config, home / "corpus")}


def test_rows_that_cannot_be_read_are_skipped_and_counted(tmp_path: Path) -> None:
    rows = [{"messages": conversation(number)} for number in range(60)]
    rows[7]["messages"] = [{"role": "critic", "content": "a"}]
    rows[9]["messages"] = [ASKED, CALLED, RETURNED, ANSWERED]
    rows[11]["messages"][0]["mood"] = "good"
    summary = corpus(tmp_path, rows, messages_column="messages")
    figures = summary["sources"]["chats"]
    assert (figures["skipped_rows"], figures["unread_fields"]) == (2, ["mood"])
    assert figures["documents"] + figures["validation_documents"] == 58
    for warnings in (summary["warnings"], summary["probe"].warnings):
        (line,) = (each for each in warnings if each.startswith("2 rows of chats"))
        assert "the role 'critic'" in line
        assert any(each.endswith("not trained on: mood") for each in warnings)


@pytest.mark.parametrize(
    ("template", "message", "reason"),
    [
        (TURNS, [{"role": "critic", "content": "a"}], "the role 'critic'.* none of the 3 rows can be read"),
        (TURNS.replace("<|im_end|>", "[end]"), [ASKED, ANSWERED], "would not learn to end an answer"),
    ],
)
def test_a_run_stops_if_no_row_can_be_read_or_none_ends(
    tmp_path: Path, template: str, message: list[dict[str, Any]], reason: str
) -> None:
    with pytest.raises(CorpusError, match=reason):
        corpus(tmp_path, [{"messages": message}] * 3, template, messages_column="messages")


def test_columns_next_to_instructions_and_ids_are_read(tmp_path: Path) -> None:
    rows = [{"instruction": f"add {n}", "input": f"{n} to it", "output": f"it is {2 * n}"} for n in range(60)]
    summary = corpus(tmp_path, rows, instruction_column="instruction")
    assert summary["sources"]["chats"]["skipped_rows"] == 0
    assert any("7 to it" in text for text in summary["probe"].sample["chats"])
    for wrong in (
        {"prompt_column": "instruction", "completion_column": "output"},
        {"ids_column": "input_ids", "train_on": "last"},
    ):
        with pytest.raises(UserError, match="instruction_column"):
            corpus(tmp_path, rows, **wrong)
