"""Conversations and token ids as documents: against transformers' own mask, and by hand where it has none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import settings as tries
from hypothesis import strategies as st

from moedisco_ray.core.config import Source, check_config
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.stages.corpus.files import list_files
from moedisco_ray.stages.corpus.rows import table_rows
from moedisco_ray.stages.text.cutting import GivenTokensError
from moedisco_ray.stages.text.given_tokens import GivenTokens, check_sources
from tests.unit.chat_data import (
    LAST_QUESTION,
    PLAIN_TURNS,
    THINKING,
    TURNS,
    WITH_TOOLS,
    conversation,
    tools_of,
    without_loop,
    write_rows,
    write_tokenizer,
)

LIMIT = 10**6
spoken = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    ["<|im_end|>", "assistant\n", " a "]
)
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), spoken), min_size=1, max_size=6).filter(
    lambda said: said[0][0] != "assistant" and any(role == "assistant" for role, _ in said)
)


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("marked")
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def unmarked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unmarked")
    write_tokenizer(directory, PLAIN_TURNS)
    return directory


@pytest.mark.ecosystem("Text: chat data, masked as transformers does", "transformers")
def test_tokens_and_mask_are_those_of_transformers_with_and_without_marks(marked: Path, unmarked: Path) -> None:
    searched = unmarked / "searched"
    write_tokenizer(searched, without_loop(PLAIN_TURNS))
    tokenizer, makers = write_tokenizer(marked), [GivenTokens(each) for each in (marked, unmarked, searched)]

    @tries(max_examples=60, deadline=None)
    @given(said=turns)
    def check(said: list[tuple[str, str]]) -> None:
        messages = [{"role": role, "content": content} for role, content in said]
        expected = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        for made in makers:
            (document,) = made.conversation(messages)
            assert document.text == text
            assert document.tokens.tolist() == expected["input_ids"]
            assert document.loss_mask.tolist() == [bool(each) for each in expected["assistant_masks"]]

    check()


both_ways = pytest.mark.parametrize("changed", [str, without_loop])


@both_ways
def test_turns_are_found_where_the_last_one_is_rendered_differently(
    tmp_path: Path, changed: Callable[[str], str]
) -> None:
    tokenizer = write_tokenizer(tmp_path, changed(THINKING))
    said = [("user", "what is a word?"), ("assistant", "a number"), ("user", "what?"), ("assistant", "the answer")]
    (document,) = GivenTokens(tmp_path).conversation([{"role": role, "content": content} for role, content in said])
    counted = "".join(tokenizer.convert_ids_to_tokens(document.tokens[document.loss_mask].tolist()))
    assert counted.replace("Ġ", " ").replace("Ċ", "\n") == (
        "a number<|im_end|>\n<think>\n\n</think>\n\nthe answer<|im_end|>\n<|endoftext|>"
    )


@both_ways
def test_turns_are_found_where_a_question_holds_the_words_of_its_answer(
    tmp_path: Path, changed: Callable[[str], str]
) -> None:
    tokenizer = write_tokenizer(tmp_path, changed(LAST_QUESTION))
    said = [("user", "say a number or a word"), ("assistant", "a number"), ("user", "end?"), ("assistant", "end")]
    (document,) = GivenTokens(tmp_path).conversation(
        [{"role": role, "content": content} for role, content in said], tools_of(1)
    )
    first, second = (text.split("<|endoftext|>")[0] for text in document.text.split("[/INST]")[1:])
    assert (first, second) == (" a number", " end")
    counted = "".join(tokenizer.convert_ids_to_tokens(document.tokens[document.loss_mask].tolist())).replace("Ġ", " ")
    assert counted == " a number<|endoftext|> end<|endoftext|>"


@both_ways
def test_the_end_of_a_turn_is_found_where_it_has_the_words_of_the_answer(
    tmp_path: Path, changed: Callable[[str], str]
) -> None:
    tokenizer = write_tokenizer(tmp_path, changed(THINKING))
    said = [("user", "what?"), ("assistant", "text"), ("user", "and?"), ("assistant", "a word")]
    (document,) = GivenTokens(tmp_path).conversation([{"role": role, "content": content} for role, content in said])
    assert "text<|im_end|>" in tokenizer.decode(document.tokens[document.loss_mask].tolist())


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (TURNS, "<|im_end|>"),
        (PLAIN_TURNS, "<|im_end|>"),
        (THINKING, "<|im_end|>"),
        (LAST_QUESTION, "<|endoftext|>"),
        (TURNS.replace("<|im_end|>", "[end]"), None),
        (None, None),
    ],
)
def test_the_token_that_ends_an_answer_is_that_of_the_template(
    tmp_path: Path, template: str | None, token: str | None
) -> None:
    tokenizer = write_tokenizer(tmp_path, template)
    assert GivenTokens(tmp_path).turn_end() == (None if token is None else tokenizer.convert_tokens_to_ids(token))


def test_nulls_in_tools_of_json_text_reach_the_template(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, WITH_TOOLS)
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"unit": {"type": "string", "default": None}}}}
    ]
    (document,) = GivenTokens(tmp_path).conversation(conversation(1), json.dumps(tools))
    assert document.text == tokenizer.apply_chat_template(conversation(1), tools=tools, tokenize=False)


def test_half_of_a_surrogate_pair_is_replaced_as_in_other_text(marked: Path) -> None:
    made = GivenTokens(marked)
    messages = [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "a\udc00"}]
    for document in (*made.conversation(messages), *made.completion("\ud800", "a\udc00")):
        assert document.text.count("\ufffd") == 2


@pytest.mark.ecosystem("Text: chat data, masked as transformers does", "transformers")
@pytest.mark.parametrize("marks", [True, False])
def test_tools_reach_the_template(tmp_path: Path, marks: bool) -> None:
    template = WITH_TOOLS if marks else WITH_TOOLS.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    write_tokenizer(tmp_path / "read", template)
    reference, made = write_tokenizer(tmp_path / "marked", WITH_TOOLS), GivenTokens(tmp_path / "read")
    for number in range(12):
        tools = tools_of(number)
        expected = reference.apply_chat_template(
            conversation(number), tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        for form in (tools, json.dumps(tools)):
            (document,) = made.conversation(conversation(number), form)
            assert document.text == reference.apply_chat_template(conversation(number), tools=tools, tokenize=False)
            assert document.tokens.tolist() == expected["input_ids"]
            assert document.loss_mask.tolist() == [bool(each) for each in expected["assistant_masks"]]
        assert (tools is None) == ("function" not in document.text)


def test_tools_and_messages_are_the_same_from_parquet_which_adds_nulls(tmp_path: Path) -> None:
    rows = [{"messages": conversation(number), "tools": tools_of(number)} for number in range(12)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (file,) = list_files("corpus.sources.0", Source(path=str(tmp_path / "rows.parquet"))).files
    write_tokenizer(tmp_path / "tokenizer", WITH_TOOLS)
    made = GivenTokens(tmp_path / "tokenizer")
    read = list(table_rows(file, ["messages", "tools"], 0, None))
    assert "'city': None" in str(read), "Parquet gives every tool the arguments of all"
    for row, given_row in zip(rows, read, strict=True):
        (one,), (other,) = (made.conversation(each["messages"], each["tools"]) for each in (row, given_row))
        assert one.text == other.text


@pytest.mark.parametrize("tools", ["{", "3", 3, ["a"], [1], {"type": "function"}])
def test_tools_that_are_no_json_schemas_are_refused(marked: Path, tools: object) -> None:
    with pytest.raises(GivenTokensError, match="tools of a row"):
        list(GivenTokens(marked).conversation(conversation(1), tools))


def test_of_messages_the_loss_counts_what_follows_the_prompt(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, WITH_TOOLS)
    made = GivenTokens(tmp_path)

    @tries(max_examples=60, deadline=None)
    @given(said=turns, cut=st.integers(1, 5), number=st.integers(0, 5))
    def check(said: list[tuple[str, str]], cut: int, number: int) -> None:
        assume(cut <= len(said))
        messages = [
            {"role": role, "content": content} for role, content in [*said[:cut], ("assistant", "a word"), *said[cut:]]
        ]
        prompt, completion, tools = messages[:cut], messages[cut:], tools_of(number)
        # As in TRL's SFTTrainer: all tokens after those of the prompt with its generation prompt.
        start = len(tokenizer.apply_chat_template(prompt, tools=tools, add_generation_prompt=True)["input_ids"])
        whole = tokenizer.apply_chat_template(messages, tools=tools)["input_ids"]
        (document,) = made.completion(prompt, completion, tools)
        assert document.tokens.tolist() == whole
        assert document.loss_mask.tolist() == [False] * start + [True] * (len(whole) - start)

    check()


def test_of_text_the_loss_counts_the_completion_and_its_end(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, None, bos=True)
    made = GivenTokens(tmp_path)

    @tries(max_examples=100, deadline=None)
    @given(prompt=spoken, completion=spoken.filter(bool))
    def check(prompt: str, completion: str) -> None:
        # As in TRL's SFTTrainer, where EOS ends a completion; packing adds BOS here.
        start = tokenizer(prompt)["input_ids"][1:]
        whole = tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"][1:]
        (document,) = made.completion(prompt, completion)
        assert document.text == prompt + completion
        assert document.tokens.tolist() == whole
        if whole[: len(start)] == start:
            assert document.loss_mask.tolist() == [False] * len(start) + [True] * (len(whole) - len(start))
        else:  # a token reaches from the prompt into the completion, and counts
            assert document.loss_mask.tolist() == sorted(document.loss_mask.tolist())
            counted = tokenizer.decode(np.array(whole)[document.loss_mask].tolist())
            assert counted.endswith(completion + tokenizer.eos_token) or "\ufffd" in counted

    check()
    ended, plain = (next(made.completion("what?", text)) for text in ("a word" + tokenizer.eos_token, "a word"))
    assert ended.tokens.tolist() == plain.tokens.tolist(), "EOS that a completion has is not repeated"
    assert ended.loss_mask.tolist() == plain.loss_mask.tolist()
    assert not list(made.completion("what?", ""))


def test_a_prompt_may_end_with_more_than_an_answer_begins_with(tmp_path: Path) -> None:
    opening = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n'"
    tokenizer = write_tokenizer(tmp_path, TURNS.replace(opening, opening + " + '<think>\n'"))
    prompt, completion = conversation(1)[:1], [{"role": "assistant", "content": "a word"}]
    (document,) = GivenTokens(tmp_path).completion(prompt, completion)
    assert "<think>" in tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    counted = tokenizer.decode(document.tokens[document.loss_mask].tolist())
    assert counted == "a word<|im_end|>\n"


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        ("a", [{"role": "assistant", "content": "b"}], "write prompt and completion alike"),
        ([{"role": "user", "content": "a"}], "b", "alike"),
        ([], [{"role": "assistant", "content": "b"}], "a prompt has no messages"),
        (None, [{"role": "assistant", "content": "b"}], "no list of messages"),
        ("a", 3, "alike"),
        (3, 4, "no list of messages"),
    ],
)
def test_rows_that_are_no_prompt_with_a_completion_are_refused(
    marked: Path, prompt: object, completion: object, message: str
) -> None:
    with pytest.raises(GivenTokensError, match=message):
        list(GivenTokens(marked).completion(prompt, completion))


def test_a_completion_cannot_be_found_where_the_template_moves_the_prompt(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, "{% for m in messages %}{{ loop.length }} {{ m.role }}{% endfor %}")
    with pytest.raises(GivenTokensError, match="renders a prompt differently"):
        list(GivenTokens(tmp_path).completion(conversation(1)[:1], conversation(1)[1:2]))


def test_a_template_that_moves_text_needs_marks(tmp_path: Path) -> None:
    # It writes the number of messages before each, so the beginning of a conversation changes when the conversation
    # continues.
    moving = "{% for i in range(messages | length) %}{{ loop.length }} {{ messages[i].role }}{% endfor %}"
    write_tokenizer(tmp_path, moving)
    with pytest.raises(GivenTokensError, match="mark them in the template"):
        list(GivenTokens(tmp_path).conversation(conversation(1)))


def test_packing_adds_the_first_token_that_the_template_writes_too(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, "{{ bos_token }}" + TURNS, bos=True)
    (document,) = GivenTokens(tmp_path).conversation(conversation(1))
    expected = tokenizer.apply_chat_template(conversation(1), return_dict=True)["input_ids"]
    assert [tokenizer.bos_token_id, *document.tokens] == expected


def test_messages_from_and_value_are_read_too(marked: Path) -> None:
    made = GivenTokens(marked)
    shared = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a word"}]
    usual = [{"role": "user", "content": "what?", "name": None}, {"role": "assistant", "content": "a word"}]
    (one,), (other,) = made.conversation(shared), made.conversation(usual)
    assert (one.text, one.loss_mask.tolist()) == (other.text, other.loss_mask.tolist())


def test_a_conversation_without_an_answer_is_left_out(marked: Path) -> None:
    for messages in ([{"role": "user", "content": "a"}], []):
        assert list(GivenTokens(marked).conversation(messages)) == []


@pytest.mark.parametrize(
    "row", ["text", [1], [{"content": "a"}], [{"role": "user", "content": None}], {}, [{"from": ["a"], "value": "b"}]]
)
def test_rows_that_are_no_conversations_are_refused(marked: Path, row: object) -> None:
    with pytest.raises(GivenTokensError):
        list(GivenTokens(marked).conversation(row))


def test_token_ids_are_kept_without_the_tokens_that_packing_adds(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, None, bos=True)
    made = GivenTokens(tmp_path)
    ids = tokenizer("the answer is a word")["input_ids"]
    (document,) = made.tokens([*ids, tokenizer.eos_token_id], LIMIT)
    assert (document.text, document.tokens.tolist(), document.loss_mask) == ("the answer is a word", ids[1:], None)
    parts = list(made.tokens(ids, 3))
    assert [part.begins for part in parts] == [True] + [False] * (len(parts) - 1)
    assert np.concatenate([part.tokens for part in parts]).tolist() == ids[1:]
    labels = [-100] * 3 + ids[3:]
    (labelled,) = made.tokens(ids, LIMIT, labels)
    assert labelled.tokens.tolist() == ids[1:]
    assert labelled.loss_mask.tolist() == [label != -100 for label in labels[1:]]
    for wrong in (labels[1:], [*labels[1:], -100], "text"):
        with pytest.raises(GivenTokensError, match="label"):
            list(made.tokens(ids, LIMIT, wrong))
    for wrong in ("text", [len(tokenizer)], [-1], ["a"], 3):
        with pytest.raises(GivenTokensError, match="list of ids"):
            list(made.tokens(wrong, LIMIT))


def test_the_tokenizer_must_suit_the_sources(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "none", None)
    write_tokenizer(tmp_path / "chat")
    path = str(write_rows(tmp_path / "chat.jsonl", "messages", [conversation(1)]))
    chat = {"path": path, "messages_column": "messages"}

    def check(source: dict[str, str], **sections: object) -> None:
        check_sources(
            check_config(
                {
                    "name": "a",
                    "corpus": {"sources": [source]},
                    "model": {"family": "qwen3_moe"},
                    "tokens": {"total": 10**6},
                    **sections,
                }
            )
        )

    with pytest.raises(ConfigError, match=r"tokenizer\.path.*chat\.jsonl"):
        check(chat)
    with pytest.raises(ConfigError, match="no chat template"):
        check(chat, tokenizer={"path": str(tmp_path / "none")})
    check({"path": path, "ids_column": "input_ids"}, tokenizer={"path": str(tmp_path / "none")})
    check({"path": path, "completion_column": "completion"}, tokenizer={"path": str(tmp_path / "none")})
    usual = {"tokenizer": {"path": str(tmp_path / "chat")}}
    check(chat, **usual)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"messages_column": "a", "ids_column": "b"}, "exclude each other"),
        ({"completion_column": "a", "messages_column": "b"}, "exclude each other"),
        ({"messages_column": "a", "format": "csv"}, "messages_column needs files that can hold it"),
        (
            {"completion_column": "a", "tools_column": "b", "format": "tsv"},
            "completion_column needs files that can hold it",
        ),
        ({"completion_column": "a", "format": "text"}, "completion_column needs files that can hold it"),
        ({"ids_column": "a", "path": "embedded"}, "ids_column needs files that can hold it"),
        ({"ids_column": "a", "tools_column": "b"}, "tools_column needs the column of the messages"),
        ({"tools_column": "b"}, "tools_column needs the column of the messages"),
    ],
)
def test_a_source_holds_one_kind_of_data(source: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(
            {
                "name": "a",
                "corpus": {"sources": [{"path": "x", **source}]},
                "model": {"family": "qwen3_moe"},
                "tokens": {"total": 10**6},
            }
        )


IN_CHATML = (
    "{%- set ns = namespace(last_query_index=0) %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}{%- set ns.last_query_index = loop.index0 %}{%- endif %}"
    "{%- endfor %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and loop.index0 > ns.last_query_index %}"
    "{{- '<think>\n' + message.reasoning_content | default('') + '\n</think>\n\n' }}"
    "{%- endif %}"
    "{{- message.content }}"
    "{%- for call in message.tool_calls %}"
    "{{- '[' + call.function.name + call.function.arguments + ']' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{%- endif %}"
)
"""A template that drops earlier answers' thinking, as Qwen3's does, and takes arguments as text, as DeepSeek's."""
UP_TO_THE_NEXT = (
    "{% for m in messages %}"
    "{%- if m.role == 'assistant' -%}<|im_start|>{{ m.content }}"
    "{%- for call in m.tool_calls or [] %}[{{ call.function.name }}{{ call.function.arguments['a'] }}]{% endfor %}"
    "{%- elif m.role == 'tool' -%}<|im_end|>{{ m.content }}"
    "{%- else -%}<s>{{ m.content }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>{%- endif -%}"
)
"""A template in which the next message begins with the token that ends an answer, as in those of GLM-4.5."""


@pytest.mark.parametrize(
    ("template", "counted"),
    [
        (
            IN_CHATML,
            (
                '<think>\na\n</think>\n\n[sum{"a": 1}]<|im_end|>\n<think>\n\n</think>\n\nno<|im_end|>\n'
                "<think>\nb\n</think>\n\nyes<|im_end|>\n"
            ),
        ),
        (UP_TO_THE_NEXT, "[sum1]<|im_end|>no<s>yes<s>"),
    ],
)
def test_thinking_calls_and_end_tokens_count_wherever_the_template_writes_them(
    tmp_path: Path, template: str, counted: str
) -> None:
    tokenizer = write_tokenizer(tmp_path, template)
    call = {"function": {"name": "sum", "arguments": {"a": 1}}}
    talk = [
        {"role": "user", "content": "what?"},
        {"role": "assistant", "tool_calls": [call], "reasoning_content": "a"},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "yes", "reasoning_content": "b"},
    ]
    (document,) = GivenTokens(tmp_path).conversation(talk)
    assert tokenizer.decode(document.tokens[document.loss_mask].tolist()) == counted
    (last,) = GivenTokens(tmp_path).conversation(talk, train_on="last")
    assert last.text == document.text
    ending = tokenizer.decode(last.tokens[last.loss_mask].tolist())
    assert counted.endswith(ending)
    assert ("yes" in ending, "no" in ending) == (True, False)
