"""Conversations and token ids as documents: against transformers' own mask, and by hand where it has none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st

from moedisco_ray.core.config import check_config
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.stages.text.cutting import GivenTokensError
from moedisco_ray.stages.text.given_tokens import GivenTokens, check_sources
from tests.unit.chat_data import PLAIN_TURNS, THINKING, TURNS, conversation, write_rows, write_tokenizer

LIMIT = 10**6
spoken = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(["<|im_end|>", "assistant\n", " a "])
turns = st.lists(st.tuples(st.sampled_from(["user", "assistant", "tool"]), spoken), min_size=1, max_size=6).filter(
    lambda said: said[0][0] != "assistant" and any(role == "assistant" for role, _ in said))


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


def test_tokens_and_mask_are_those_of_transformers_with_and_without_marks(marked: Path, unmarked: Path) -> None:
    tokenizer, makers = write_tokenizer(marked), [GivenTokens(marked), GivenTokens(unmarked)]

    @tries(max_examples=60, deadline=None)
    @given(said=turns)
    def check(said: list[tuple[str, str]]) -> None:
        messages = [{"role": role, "content": content} for role, content in said]
        expected = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        for made in makers:
            document, = made.conversation(messages, LIMIT)
            assert document.text == text
            assert document.tokens.tolist() == expected["input_ids"]
            assert document.loss_mask.tolist() == [bool(each) for each in expected["assistant_masks"]]

    check()


def test_turns_are_found_where_the_last_one_is_rendered_differently(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, THINKING)
    said = [("user", "what is a word?"), ("assistant", "a number"), ("user", "what?"), ("assistant", "the answer")]
    document, = GivenTokens(tmp_path).conversation([{"role": role, "content": content} for role, content in said], LIMIT)
    counted = "".join(tokenizer.convert_ids_to_tokens(document.tokens[document.loss_mask].tolist()))
    assert counted.replace("Ġ", " ").replace("Ċ", "\n") == (
        "a number<|im_end|>\n<think>\n\n</think>\n\nthe answer<|im_end|>\n<|endoftext|>")


def test_a_template_that_moves_text_needs_marks(tmp_path: Path) -> None:
    # It writes the number of messages before each, so the beginning of a conversation changes when the conversation continues.
    moving = "{% for m in messages %}{{ loop.length }} {{ m.role }}{% endfor %}"
    write_tokenizer(tmp_path, moving)
    with pytest.raises(GivenTokensError, match="mark them in the template"):
        list(GivenTokens(tmp_path).conversation(conversation(1), LIMIT))


def test_a_long_conversation_is_cut_and_nothing_is_lost(marked: Path) -> None:
    tokenizer = write_tokenizer(marked)
    messages = conversation(3) + conversation(4)
    expected = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = np.array(expected["input_ids"]), np.array(expected["assistant_masks"], bool)
    limit = 16
    parts = list(GivenTokens(marked).conversation(messages, limit))
    kept = [start for start in range(0, len(ids), limit) if mask[start:start + limit].any()]
    assert len(kept) > 3
    assert [part.begins for part in parts] == [True] + [False] * (len(kept) - 1)
    for part, start in zip(parts, kept, strict=True):
        assert part.tokens.tolist() == ids[start:start + limit].tolist()
        assert part.loss_mask.tolist() == mask[start:start + limit].tolist()
    assert all(part.text in tokenizer.apply_chat_template(messages, tokenize=False) for part in parts)


def test_packing_adds_the_first_token_that_the_template_writes_too(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, "{{ bos_token }}" + TURNS, bos=True)
    document, = GivenTokens(tmp_path).conversation(conversation(1), LIMIT)
    expected = tokenizer.apply_chat_template(conversation(1), return_dict=True)["input_ids"]
    assert [tokenizer.bos_token_id, *document.tokens] == expected


def test_messages_from_and_value_are_read_too(marked: Path) -> None:
    made = GivenTokens(marked)
    shared = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a word"}]
    usual = [{"role": "user", "content": "what?", "name": None}, {"role": "assistant", "content": "a word"}]
    (one,), (other,) = made.conversation(shared, LIMIT), made.conversation(usual, LIMIT)
    assert (one.text, one.loss_mask.tolist()) == (other.text, other.loss_mask.tolist())


def test_a_conversation_without_an_answer_is_left_out(marked: Path) -> None:
    assert list(GivenTokens(marked).conversation([{"role": "user", "content": "a"}], LIMIT)) == []


@pytest.mark.parametrize("row", ["text", [1], [{"content": "a"}], [{"role": "user", "content": None}], {}])
def test_rows_that_are_no_conversations_are_refused(marked: Path, row: object) -> None:
    with pytest.raises(GivenTokensError):
        list(GivenTokens(marked).conversation(row, LIMIT))


def test_token_ids_are_kept_without_the_tokens_that_packing_adds(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, None, bos=True)
    made = GivenTokens(tmp_path)
    ids = tokenizer("the answer is a word")["input_ids"]
    document, = made.tokens([*ids, tokenizer.eos_token_id], LIMIT)
    assert (document.text, document.tokens.tolist(), document.loss_mask) == ("the answer is a word", ids[1:], None)
    parts = list(made.tokens(ids, 3))
    assert [part.begins for part in parts] == [True] + [False] * (len(parts) - 1)
    assert np.concatenate([part.tokens for part in parts]).tolist() == ids[1:]
    for wrong in ("text", [len(tokenizer)], [-1], ["a"], 3):
        with pytest.raises(GivenTokensError, match="list of ids"):
            list(made.tokens(wrong, LIMIT))


def test_the_tokenizer_must_suit_the_sources(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "none", None)
    write_tokenizer(tmp_path / "chat")
    path = str(write_rows(tmp_path / "chat.jsonl", "messages", [conversation(1)]))
    chat = {"path": path, "messages_column": "messages"}

    def check(source: dict[str, str], **sections: object) -> None:
        check_sources(check_config({
            "name": "a", "corpus": {"sources": [source]}, "model": {"family": "qwen3_moe"}, "tokens": {"total": 10**6},
            **sections}))

    with pytest.raises(ConfigError, match=r"tokenizer\.path.*chat\.jsonl"):
        check(chat)
    with pytest.raises(ConfigError, match="no chat template"):
        check(chat, tokenizer={"path": str(tmp_path / "none")})
    check({"path": path, "ids_column": "input_ids"}, tokenizer={"path": str(tmp_path / "none")})
    usual = {"tokenizer": {"path": str(tmp_path / "chat")}}
    check(chat, **usual)
    within = {"optimizer": {"within_documents": True}}
    check(chat, finetune=within, **usual)
    settings = tmp_path / "chat" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"eos_token": "<|endoftext|>"', '"eos_token": "<|im_end|>"'))
    with pytest.raises(ConfigError, match=r"finetune\.optimizer\.within_documents"):
        check(chat, finetune=within, **usual)


@pytest.mark.parametrize("source", [
    {"messages_column": "a", "ids_column": "b"}, {"messages_column": "a", "format": "csv"},
    {"ids_column": "a", "path": "embedded"}])
def test_a_source_holds_one_kind_of_data(source: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="messages_column and ids_column"):
        check_config({
            "name": "a", "corpus": {"sources": [{"path": "x", **source}]}, "model": {"family": "qwen3_moe"},
            "tokens": {"total": 10**6}})
