"""Conversations and completions as documents, compared with the labels of the same rows in TRL's SFTTrainer."""

from __future__ import annotations

import importlib
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from moedisco_ray.packed_tokens import TokenStream, write_conversations, write_index
from moedisco_ray.stages.text.cutting import Document, GivenTokensError
from moedisco_ray.stages.text.given_tokens import GivenTokens
from moedisco_ray.stages.text.messages import talk_of
from tests.unit.chat_data import WITH_TOOLS, conversation, tools_of, write_tokenizer

pytestmark = [
    pytest.mark.ecosystem("Text: chat data, masked as TRL does", "trl", "transformers"),
    pytest.mark.filterwarnings("default"),
]  # those of TRL's trainer are not ours
Labelled = list[tuple[list[int], list[bool]]]
TALKS = [conversation(number) for number in range(12)]  # one to three answers each; some begin with a system message
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
FIRST, SECOND = {"role": "user", "content": "what is a word?"}, {"role": "user", "content": "and then?"}
SIX = {
    "plain": [FIRST, {"role": "assistant", "content": "a number"}],
    "system": [{"role": "system", "content": "be brief"}, FIRST, {"role": "assistant", "content": "a number"}],
    "turns": [FIRST, {"role": "assistant", "content": "a number"}, SECOND, {"role": "assistant", "content": "the end"}],
    "tools": [
        FIRST,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "content": "3"},
        {"role": "assistant", "content": "the answer is 3"},
    ],
    "inline": [
        FIRST,
        {"role": "assistant", "content": "<think>\na thought\n</think>\n\na number"},
        SECOND,
        {"role": "assistant", "content": "<think>\nmore\n</think>\n\nthe end"},
    ],
    "field": [
        FIRST,
        {"role": "assistant", "content": "a number", "reasoning_content": "a thought"},
        SECOND,
        {"role": "assistant", "content": "the end", "reasoning_content": "more"},
    ],
}
"""Six kinds of conversations."""
PARTS = ("idefics3", "llava_next", "smolvlm")
"""Templates that read content as lists of parts only."""
NO_TOOLS = (
    "cohere", "cohere2", "deepseek_r1_distill", "gemma", "gemma3", "idefics3", "lfm2", "llama3", "llava_next", "phi3",
    "phi3_5", "qwen2_5_vl", "smolvlm",
)  # fmt: skip
"""Templates that leave out calls of functions or what they return, or refuse them, as TRL's list of templates says."""
HEADERS = {
    "deepseek_r1_distill": "<\uff5cAssistant\uff5c>",
    "deepseekv3": "<\uff5cAssistant\uff5c>",
    "gptoss": "<|start|>assistant",
    "muse_glimmer": "<|start|>assistant",
    "qwen2_5": "\n",
}
"""What TRL counts before an answer although the prompt for it ends with it. Ours counts what the model writes."""
DIFFERENT = {
    ("deepseekv3", "inline"): "TRL leaves out the thinking; ours trains on it, since prompts end with its beginning",
    ("diffusion_gemma", "tools"): "the template writes what a tool returns inside the turn; ours skips the row",
    ("gemma", "system"): "the template refuses system messages",
    **{("llava_next", kind): "TRL does not count the space after the end token" for kind in SIX},
}
"""Conversations in which the labels differ, and why."""
_SPECIAL = re.compile(
    r"<[|\uff5c][^<>|\uff5c\s]+[|\uff5c]>|<turn\|>|<\|turn>|<(?:start|end)_of_\w+>|<\|[A-Z_]+\|>|\[gMASK\]|<sop>"
)


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


def counted_by_trl(family: str, tokenizer: PreTrainedTokenizerBase, kind: str) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation and whether TRL counts them, without the headers in `HEADERS`."""
    templates = importlib.import_module("trl.chat_template_utils")
    talk = SIX[kind]
    if family in PARTS:
        talk = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in talk]
    found = tokenizer.apply_chat_template(
        talk,
        tools=tools_of(2) if kind == "tools" else None,
        chat_template=getattr(templates, f"{family}_training_chat_template"),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = found["input_ids"], [bool(each) for each in found["assistant_masks"]]
    header = tokenizer(HEADERS.get(family, ""), add_special_tokens=False)["input_ids"]
    for start in [at for at, each in enumerate(mask) if each and not (at and mask[at - 1])] if header else []:
        if ids[start : start + len(header)] == header:
            mask[start : start + len(header)] = [False] * len(header)
    return ids, mask


@pytest.mark.parametrize("kind", SIX)
def test_the_loss_counts_what_trl_counts_in_all_its_templates(tmp_path: Path, kind: str) -> None:
    """Every difference is listed above with its reason; in each conversation, an end token counts."""
    templates = pytest.importorskip("trl.chat_template_utils", reason="trl is not installed")
    end = "_training_chat_template"
    families = sorted(name.removesuffix(end) for name in vars(templates) if name.endswith(end) and name[:3] != "get")
    assert len(families) > 30  # those of TRL 1.16
    for family in families:
        own, home = getattr(templates, f"{family}_chat_template"), tmp_path / family
        tokenizer = write_tokenizer(home, own, bos=True)
        special = sorted({*_SPECIAL.findall(own), "<end_of_utterance>", "</s>"})
        tokenizer.add_special_tokens({"additional_special_tokens": special})
        tokenizer.save_pretrained(home)
        made = GivenTokens(home)
        left_out = (kind == "tools" and family in NO_TOOLS) or DIFFERENT.get((family, kind), "").startswith("the templ")
        try:
            found = made.render(talk_of(SIX[kind], own), tools_of(2) if kind == "tools" else None)
        except GivenTokensError:
            assert left_out, family
            continue
        counted = {tokenizer.decode([token]) for token in found.ids[found.loss_mask].tolist()}
        assert counted & {*special, "<|im_end|>", "<|endoftext|>"}, family
        if not left_out:
            same = (found.ids.tolist(), found.loss_mask.tolist()) == counted_by_trl(family, tokenizer, kind)
            assert same == ((family, kind) not in DIFFERENT), family


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
