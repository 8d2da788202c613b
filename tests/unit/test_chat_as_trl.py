"""Conversations and completions as documents, compared with the labels of the same rows in TRL's SFTTrainer."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from moedisco_ray.packed_tokens import TokenStream, write_conversations, write_index
from moedisco_ray.stages.text.cutting import Document
from moedisco_ray.stages.text.given_tokens import GivenTokens
from tests.unit.chat_data import WITH_TOOLS, conversation, tools_of, write_tokenizer

pytestmark = [
    pytest.mark.ecosystem("Text: chat data, masked as TRL does", "trl", "transformers"),
    pytest.mark.filterwarnings("default"),
]  # those of TRL's trainer are not ours
Labelled = list[tuple[list[int], list[bool]]]
TALKS = [conversation(number) for number in range(12)]  # one to three answers each; some begin with a system message
CALL = [
    {"role": "user", "content": "what is the sum?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "sum", "arguments": {"a": 1, "b": 2}}}],
    },
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "the answer is 3"},
]
FAMILIES = ("qwen2_5", "qwen3_instruct_2507", "llama3", "phi3", "phi3_5", "gemma", "cohere")
"""Chat templates of published models that TRL stores, and marks for its training without another change."""


def labelled(tokenizer: PreTrainedTokenizerBase, home: Path, rows: list[dict[str, Any]], **settings: Any) -> Labelled:
    """Tokens of the rows that TRL trains on, and whether its labels count them."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(str(home), use_cpu=True, bf16=False, report_to="none", **{"max_length": None, **settings}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batches = [trainer.data_collator([row]) for row in trainer.train_dataset]
    return [(batch["input_ids"][0].tolist(), (batch["labels"][0] != -100).tolist()) for batch in batches]


def ours(documents: list[Document]) -> Labelled:
    return [(document.tokens.tolist(), document.loss_mask.tolist()) for document in documents]


def packed(documents: list[Document], directory: Path, length: int) -> Labelled:
    """The documents as training gets them, in the order of their tokens."""
    directory.mkdir()
    ids = np.concatenate([each.tokens for each in documents])
    mask = np.concatenate([each.loss_mask for each in documents])
    lengths = np.array([len(each.tokens) for each in documents])
    piece = write_conversations(directory / "part.npy", ids, mask, lengths, length=length, vocab_size=1000)
    write_index(directory, [piece], 1000, length)
    stream, found = TokenStream([directory], length), []
    for i in range(len(stream)):
        tokens, counts = stream.window(i).tolist(), [False, *stream.loss_mask(i).tolist()]
        starts, filled = np.flatnonzero(stream.document_starts(i)).tolist(), stream.filled(i)
        bounds = [*(start for start in starts if start < filled), filled]
        found += [(tokens[start:stop], counts[start:stop]) for start, stop in pairwise(bounds)]
    return sorted(found)


@pytest.mark.parametrize("limit", [1000, 24])
def test_conversations_have_the_labels_of_trl(tmp_path: Path, limit: int) -> None:
    tokenizer = write_tokenizer(tmp_path / "marked", WITH_TOOLS)
    write_tokenizer(tmp_path / "plain", WITH_TOOLS.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    rows = [{"messages": talk, "tools": json.dumps(tools_of(number))} for number, talk in enumerate(TALKS)]
    expected = labelled(tokenizer, tmp_path, rows, assistant_only_loss=True, max_length=limit)
    assert 0 < len(expected) <= len(rows)
    for name in ("marked", "plain"):
        made = GivenTokens(tmp_path / name)
        documents = [next(made.conversation(row["messages"], row["tools"])) for row in rows]
        assert packed(documents, tmp_path / f"{name}-packed", limit - 1) == sorted(expected)


def with_token_before(loss_mask: list[bool]) -> list[bool]:
    """A mask that also counts the token before each counted one."""
    return [each or following for each, following in pairwise([*loss_mask, False])]


@pytest.mark.parametrize("family", FAMILIES)
def test_turns_in_published_templates_are_those_that_trl_marks(tmp_path: Path, family: str) -> None:
    templates = pytest.importorskip("trl.chat_template_utils", reason="trl is not installed")
    tokenizer = write_tokenizer(tmp_path / "tokenizer", getattr(templates, f"{family}_chat_template"), bos=True)
    made = GivenTokens(tmp_path / "tokenizer")
    talks = [*(talk[talk[0]["role"] == "system" :] for talk in TALKS), *([CALL] if "qwen" in family else [])]
    expected = labelled(tokenizer, tmp_path, [{"messages": talk} for talk in talks], assistant_only_loss=True)
    found = [(each.ids.tolist(), each.loss_mask.tolist()) for each in map(made.render, talks)]
    if family == "qwen2_5":  # TRL also counts the line break before an answer, which the prompt for it ends with
        found = [(ids, with_token_before(mask)) for ids, mask in found]
    assert found == expected


def test_completions_have_the_labels_of_trl(tmp_path: Path) -> None:
    tokenizer, made = write_tokenizer(tmp_path / "tokenizer", WITH_TOOLS), GivenTokens(tmp_path / "tokenizer")
    texts = [("what is", " a word?"), ("the an", "swer is a number"), ("", "a"), ("the end", " <|endoftext|>")]
    talks = [(talk[:-1], talk[-1:]) for talk in TALKS]
    for pairs, tools in (
        (texts, [None] * len(texts)),
        (talks, [json.dumps(tools_of(number)) for number in range(len(talks))]),
    ):
        rows = [
            {"prompt": prompt, "completion": completion, "tools": tool}
            for (prompt, completion), tool in zip(pairs, tools, strict=True)
        ]
        found = [next(made.completion(row["prompt"], row["completion"], row["tools"])) for row in rows]
        assert ours(found) == labelled(tokenizer, tmp_path, rows)
