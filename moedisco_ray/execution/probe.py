"""Measure this machine in about two seconds: training steps of small models, tokenizing, and the start of a process.

`python -m moedisco_ray.execution.probe` prints a `plan.speed.Probe` as JSON. Times are CPU times of one core: other
work on the machine hardly changes them.
"""

from __future__ import annotations

import os
import time

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from moedisco_ray.core.config import Architecture
from moedisco_ray.models import hf_config, specialise
from moedisco_ray.plan import count_parameters
from moedisco_ray.plan.cost import flops_per_token
from moedisco_ray.plan.machine import library_versions
from moedisco_ray.plan.speed import Probe, Trial

_SEQUENCE, _BATCH, _VOCABULARY = 128, 8, 2048
_TRIAL_SECONDS = 0.4
_TEXT_BYTES = 200_000


def main() -> None:
    started = time.process_time()  # CPU time since the process began
    torch.set_num_threads(1)
    trials = [_trial(hidden, experts) for experts in (1, 4) for hidden in (64, 128, 256)]
    probe = Probe(
        cores=len(os.sched_getaffinity(0)),
        versions=library_versions(),
        trials=tuple(trials),
        start_up_seconds=started,
        text_bytes_per_second=_text_rate(),
    )
    print(probe.model_dump_json())  # noqa: T201 - the process' only output


def _trial(hidden: int, experts: int) -> Trial:
    shape = Architecture(
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        moe_intermediate_size=2 * hidden,
        num_experts=experts,
        num_experts_per_tok=min(2, experts),
        tie_word_embeddings=True,
    )
    model = specialise(
        AutoModelForCausalLM.from_config(hf_config("qwen3_moe", shape, _VOCABULARY, _SEQUENCE, 0))
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens_BL = torch.randint(0, _VOCABULARY, (_BATCH, _SEQUENCE), generator=torch.Generator().manual_seed(0))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits_BLV = model(input_ids=tokens_BL, use_cache=False).logits
        loss = cross_entropy(logits_BLV[:, :-1].flatten(0, 1), tokens_BL[:, 1:].flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    step()  # the first step also allocates memory, so it is not timed
    began, steps = time.process_time(), 0
    while steps == 0 or time.process_time() - began < _TRIAL_SECONDS:
        step()
        steps += 1
    seconds = (time.process_time() - began) / steps
    each = flops_per_token(count_parameters("qwen3_moe", shape, _VOCABULARY), shape, _SEQUENCE, checkpointing=False)
    return Trial(experts=experts, flops_per_token=each, flops_per_second=each * tokens_BL.numel() / seconds)


def _text_rate() -> float:
    """Measured speed of training a byte-level BPE tokenizer and encoding with it, in bytes per second."""
    words = [f"word{number * 7919 % 5003} of({number})" for number in range(_TEXT_BYTES // 16)]
    lines = [" ".join(words[start : start + 20]) for start in range(0, len(words), 20)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    began = time.process_time()
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=_VOCABULARY, show_progress=False))
    tokenizer.encode_batch(lines)
    return sum(map(len, lines)) / (time.process_time() - began)


if __name__ == "__main__":
    main()
