"""A training step, whole process against whole process.

On a sub-model:

ours         the product's training loop on a one-expert sub-model, router, checkpoints and progress events included
bare         the shortest PyTorch loop on the dense Hugging Face model of the same sizes
trainer      the Hugging Face Trainer on that dense model

On a whole MoE of 16 small experts, with the load-balance loss:

ours-moe     the product's training loop
compiled-moe the product's training loop with `optimizer.compile`
trainer-moe  the Hugging Face Trainer on the Hugging Face MoE of the same sizes

Same sizes, batch, optimizer, data and thread count. Tokens per second are those of steady state: the first steps are
not counted. Targets: ours / bare >= 0.97, ours / trainer > 1, ours-moe / trainer-moe > 1.2, with and
without compilation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.harness import by_arm, environment, interleave, ratios, spread, write_result
from moedisco_ray.core.config import Architecture, Optimizer
from moedisco_ray.core.records.events import Event
from moedisco_ray.models import ModelMap, config_values, hf_config, random_weights, submodel_config, write_checkpoint
from moedisco_ray.packed_tokens import write_packed
from moedisco_ray.stages.decompose import decompose
from moedisco_ray.training import TrainJob, World, train

SIZES = Architecture(
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    moe_intermediate_size=704,
    num_experts=4,
    num_experts_per_tok=2,
)
MOE = SIZES.model_copy(update={"num_experts": 16, "moe_intermediate_size": 352})
VOCABULARY, LENGTH, BATCH = 4096, 128, 16
STEPS, WARM = 36, 12
LOAD_BALANCE = 0.01
ARMS = ("ours", "bare", "trainer", "ours-moe", "compiled-moe", "trainer-moe")
RATIOS = {
    "ours_over_bare": ("ours", "bare", 0.97),
    "ours_over_trainer": ("ours", "trainer", 1.0),
    "moe_ours_over_trainer": ("ours-moe", "trainer-moe", 1.2),
    "moe_compiled_over_trainer": ("compiled-moe", "trainer-moe", 1.2),
}
"""For each ratio its two arms and its target."""


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, (STEPS + 4) * BATCH * LENGTH, dtype=np.int64)


def dense_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=SIZES.hidden_size,
            intermediate_size=SIZES.moe_intermediate_size,
            num_hidden_layers=SIZES.num_hidden_layers,
            num_attention_heads=SIZES.num_attention_heads,
            num_key_value_heads=SIZES.key_value_heads,
            head_dim=SIZES.head_size,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=False,
            use_cache=False,
        )
    )


def per_second(times: list[float]) -> float:
    """Tokens per second from the moments at which steps ended; the median step, so that one hiccup does not count."""
    return BATCH * LENGTH / statistics.median(np.diff(times[WARM:]))


def moe_model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = hf_config("qwen3_moe", MOE, VOCABULARY, LENGTH, 0)
    config.output_router_logits, config.router_aux_loss_coef, config.use_cache = True, LOAD_BALANCE, False
    return AutoModelForCausalLM.from_config(config)


def ours(scratch: Path) -> float:
    config = config_values(hf_config("qwen3_moe", SIZES, VOCABULARY, LENGTH, 0))
    tensors = decompose(random_weights(config, 0), ModelMap("qwen3_moe"), SIZES.num_experts, SIZES.num_experts, 0)
    write_checkpoint(scratch / "start", tensors, submodel_config(config, 1))
    return train_ours(scratch, load_balance=0.0)


def ours_moe(scratch: Path, *, compiled: bool = False) -> float:
    config = config_values(hf_config("qwen3_moe", MOE, VOCABULARY, LENGTH, 0))
    write_checkpoint(scratch / "start", random_weights(config, 0).items(), config)
    return train_ours(scratch, load_balance=LOAD_BALANCE, compiled=compiled)


def train_ours(scratch: Path, load_balance: float, *, compiled: bool = False) -> float:
    """Tokens per second of the product's loop on the model in `start`."""
    write_packed(scratch / "shards", [[tokens().astype(np.int32)]], eos=0, vocab_size=VOCABULARY)
    times: list[float] = []

    def clock(event: Event) -> None:
        if event.type == "progress":
            times.append(time.perf_counter())

    job = TrainJob(
        stage="submodels",
        name="submodel-0",
        model=scratch / "start",
        packed_dirs=(scratch / "shards",),
        output=scratch / "trained",
        checkpoints=scratch / "steps",
        steps=STEPS,
        sequence_length=LENGTH,
        checkpoint_every=STEPS,
        log_every=1,
        load_balance=load_balance,
        optimizer=Optimizer(lr=1e-4, batch_tokens=BATCH * LENGTH, compile=compiled),
    )
    train(job, World(), clock, lambda: False)
    return per_second(times)


def bare(_: Path) -> float:
    model = dense_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01)
    data = torch.from_numpy(tokens()[: STEPS * BATCH * LENGTH + 1])
    inputs, targets = (half.reshape(STEPS, BATCH, LENGTH) for half in (data[:-1], data[1:]))
    times = []
    for x_BL, y_BL in zip(inputs, targets, strict=True):
        logits_BLV = model(input_ids=x_BL).logits
        loss = torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), y_BL.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        times.append(time.perf_counter())
    return per_second(times)


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self) -> None:
        self.x_NL = torch.from_numpy(tokens()[: STEPS * BATCH * LENGTH].reshape(-1, LENGTH))

    def __len__(self) -> int:
        return len(self.x_NL)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.x_NL[index], "labels": self.x_NL[index]}


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.perf_counter())


def trainer(scratch: Path, model: PreTrainedModel) -> float:
    clock = Clock()
    Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(scratch),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-4,
            weight_decay=0.01,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Rows(),
        callbacks=[clock],
    ).train()
    return per_second(clock.times)


def measure(arm: str, scratch: Path) -> float:
    """Tokens per second of an arm."""
    if arm == "trainer":
        return trainer(scratch, dense_model())
    if arm == "trainer-moe":
        return trainer(scratch, moe_model())
    if arm == "compiled-moe":
        return ours_moe(scratch, compiled=True)
    return {"ours": ours, "bare": bare, "ours-moe": ours_moe}[arm](scratch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    if arguments.arm:
        transformers.logging.set_verbosity_error()
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps({"tokens_per_second": measure(arguments.arm, Path(scratch))}))
        return
    rounds = interleave(__spec__.name, ARMS, arguments.rounds)
    speed = by_arm(rounds, "tokens_per_second")
    write_result(
        "training_step",
        {
            **environment(f"python -m benchmarks.training_step --rounds {arguments.rounds}"),
            "setting": {
                "architecture": SIZES.model_dump(),
                "moe": {
                    "num_experts": MOE.num_experts,
                    "moe_intermediate_size": MOE.moe_intermediate_size,
                    "load_balance": LOAD_BALANCE,
                },
                "vocabulary": VOCABULARY,
                "sequence_length": LENGTH,
                "batch": BATCH,
                "steps": STEPS,
                "warm_up_steps": WARM,
                "threads": 1,
                "rounds": arguments.rounds,
                "seed": 0,
            },
            "tokens_per_second": {arm: spread(values) for arm, values in speed.items()},
            **{name: ratios(speed[ours], speed[theirs]) for name, (ours, theirs, _) in RATIOS.items()},
            "targets": {name: target for name, (*_, target) in RATIOS.items()},
        },
    )


if __name__ == "__main__":
    main()
