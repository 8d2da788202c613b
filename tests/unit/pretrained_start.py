"""A small dense model as it would be downloaded, slightly trained, with tokenizer, template and generation settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from small_run import DOMAINS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

BOS, END, TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<|eot_id|>{% endfor %}"
)
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VOCABULARY, STEPS = 512, 40


def texts() -> list[str]:
    """Paragraphs of the standard library's source."""
    found: list[str] = []
    for module in DOMAINS.values():
        for path in sorted(Path(str(module.__file__)).parent.glob("*.py")):
            found += [part for part in path.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    return found


def write_tokenizer(directory: Path, begins: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE with an end-of-turn token and, where a text `begins` with BOS, the post-processor for it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts()[:400],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - 3, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    tokenizer.add_special_tokens([BOS, END, TURN])
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    loaded = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=END, model_max_length=4096)
    loaded.chat_template = TEMPLATE
    loaded.save_pretrained(directory)
    return loaded


def write_start(directory: Path, kind: str = "llama", begins: bool = True, **changes: Any) -> Path:
    """A dense model in bf16, its config.json as transformers 4 writes it, that ends at either of two tokens."""
    tokenizer = write_tokenizer(directory, begins)
    end, turn, bos = (tokenizer.convert_tokens_to_ids(token) for token in (END, TURN, BOS))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(
                kind,
                **{
                    "vocab_size": VOCABULARY,
                    "hidden_size": 48,
                    "intermediate_size": 64,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "head_dim": 12,
                    "max_position_embeddings": 256,
                    "rope_parameters": dict(ROPE),
                    "bos_token_id": bos,
                    "eos_token_id": [end, turn],
                    "pad_token_id": turn,
                    "tie_word_embeddings": True,
                    **changes,
                },
            )
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        stream = [token for text in texts()[:600] for token in (*tokenizer(text)["input_ids"], end)]
        ids_NL = torch.tensor(stream[: len(stream) // 64 * 64]).view(-1, 64)
        for step in range(STEPS):
            loss = model(input_ids=ids_NL[8 * step : 8 * step + 8], labels=ids_NL[8 * step : 8 * step + 8]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.generation_config = GenerationConfig(
        bos_token_id=bos, eos_token_id=[end, turn], do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.05
    )
    model.to(torch.bfloat16).save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    path.write_text(json.dumps(config), encoding="utf-8")
    (directory / "LICENSE").write_text("terms", encoding="utf-8")
    return directory
