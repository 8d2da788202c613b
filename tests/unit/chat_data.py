"""A small tokenizer with a chat template, and conversations."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>")
TURNS = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' %}{% generation %}{{- message.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{%- else %}{{- message.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""A template with the format of Qwen2.5, which marks the assistant's tokens."""
PLAIN_TURNS = TURNS.replace("{% generation %}", "").replace("{% endgeneration %}", "")
"""The same template without the marks."""
WITH_TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}" + TURNS
)
"""The template with marks, which also writes the tools, as that of Qwen2.5 does."""
CHATML = {
    "SmolLM2": (
        "{%- if messages[0].role != 'system' %}{{- '<|im_start|>system\nbe short<|im_end|>\n' }}{%- endif %}"
        + PLAIN_TURNS,
        {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "pad_token": "<|im_end|>"},
    ),
    "Qwen": (PLAIN_TURNS, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
}
"""Templates and special tokens as in SmolLM2 and Qwen2.5: the end token of a document is that of a turn, too."""
THINKING = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- message.content.strip() + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- else %}{{- eos_token }}{%- endif %}"
)
"""A template that renders the last turn differently from the earlier ones, as those of Qwen3 and Phi-3 do."""


def without_loop(template: str) -> str:
    """The template with a loop over numbers, in which messages are not marked, so that turns are searched for."""
    return template.replace(
        "{%- for message in messages %}",
        "{%- for number in range(messages | length) %}{%- set message = messages[number] %}",
    )


LAST_QUESTION = (
    "{%- set questions = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}"
    "{%- if tools and message == questions[-1] %}{{- '[TOOLS]' + tools | tojson }}{%- endif %}"
    "{{- '[INST]' + message.content + '[/INST]' }}"
    "{%- else %}{{- ' ' + message.content.strip() + eos_token }}{%- endif %}"
    "{%- endfor %}"
)
"""A template that writes the tools before the last question only, as that of Mistral-7B-Instruct-v0.3 does."""


def write_tokenizer(
    directory: Path, template: str | None = TURNS, *, bos: bool = False, special: dict[str, str] | None = None
) -> PreTrainedTokenizerBase:
    """Write and load a byte-level tokenizer; with `bos`, it adds `<s>` before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    sample = ["user assistant system think " * 8, "the answer is a number and the question is a word " * 8]
    tokenizer.train_from_iterator(
        sample,
        trainers.BpeTrainer(
            vocab_size=400,
            show_progress=False,
            special_tokens=[*SPECIAL],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    named = {"eos_token": "<|endoftext|>", **({"bos_token": "<s>"} if bos else {}), **(special or {})}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    if template is not None:
        made.chat_template = template
    made.save_pretrained(directory)
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
    return loaded


def conversation(number: int) -> list[dict[str, Any]]:
    """A conversation of one to three questions and answers, the same for the same number."""
    numbers = random.Random(number)
    words = ("the", "answer", "is", "a", "number", "and", "question", "word", "grün", "漢字", "x=1")
    said = [" ".join(numbers.choices(words, k=numbers.randint(2, 25))) for _ in range(2 * numbers.randint(1, 3))]
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"{text} {number}"} for i, text in enumerate(said)]
    return [{"role": "system", "content": "be brief"}, *turns] if numbers.random() < 0.3 else turns


def tools_of(number: int) -> list[dict[str, Any]] | None:
    """Up to two tools with different arguments, as JSON schemas; the same for the same number, and none for some."""
    names = [("weather", {"city": {"type": "string"}}), ("sum", {"a": {"type": "number"}, "b": {"type": "number"}})][
        : number % 3
    ]
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": f"the {name} {number}",
                "parameters": {"type": "object", "properties": properties, "required": list(properties)},
            },
        }
        for name, properties in names
    ] or None


def write_rows(path: Path, column: str, rows: list[Any]) -> Path:
    """Write values of one column as JSON Lines."""
    path.write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    return path
