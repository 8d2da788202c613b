"""The finished directory: weights, configuration, tokeniser, generation defaults, model card, and the proof of it."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from moedisco_ray.artifacts import write_json
from moedisco_ray.errors import CheckpointError, RunError
from moedisco_ray.export.card import model_card
from moedisco_ray.export.samples import continue_prompts
from moedisco_ray.model_map import (
    Checkpoint,
    ModelMap,
    Role,
    config_values,
    load_model,
    open_checkpoint,
    read_config,
    write_checkpoint,
    write_config,
)

_SUFFIXES = {".safetensors", ".json", ".md", ".jinja"}
_PROBE = ("  The quick brown fox\n\tdef f(x):", "return x**2  # Größe, 漢字, 12345, it's")


def export(
    model_dir: Path, tokenizer_dir: Path, directory: Path, report: Mapping[str, Any], *, prompts: Sequence[str] = (),
    sample_tokens: int = 48, seed: int = 0,
) -> dict[str, Any]:
    """Write the finished directory, load it again, and compare it with the trained model.

    Weight files that hold the family's classic per-expert names are hard-linked, or copied where that is not possible;
    others are rewritten tensor by tensor. The comparison holds one model in memory at a time.

    Args:
        model_dir: The trained model.
        tokenizer_dir: A directory that `AutoTokenizer` loads.
        directory: Where to; made where it is missing.
        report: The run's report, for the model card.
        prompts: What the finished model is to continue, for the model card.
        sample_tokens: Tokens to add to each.
        seed: Of the run.

    Returns:
        `parameters`, `active_parameters` (that one token uses), `bytes` of the weights, and `samples` [{prompt, text}].

    Raises:
        CheckpointError: The trained model's tensors are not exactly its family's.
        RunError: What was written does not give the trained model's logits, bit for bit, or the tokeniser's tokens.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _write_weights(model_dir, directory)
    weights = open_checkpoint(directory)
    dtype = weights["model.norm.weight"].dtype
    tokenizer = _write_tokenizer(tokenizer_dir, directory, int(weights.config["max_position_embeddings"]))
    _write_configs(tokenizer, dtype, directory)
    model = _verified(model_dir, directory, dtype)
    total, active = count_parameters(weights)
    figures = {
        "parameters": total,
        "active_parameters": active,
        "bytes": sum(path.stat().st_size for path in directory.glob("*.safetensors")),
        "samples": continue_prompts(model, tokenizer, prompts, sample_tokens, seed),
    }
    (directory / "README.md").write_text(model_card(report, figures), encoding="utf-8")
    if strange := sorted(path.name for path in directory.iterdir() if path.suffix not in _SUFFIXES):
        raise RunError(f"the export holds a file of a kind that does not belong there: {strange[0]}")
    return figures


def count_parameters(weights: Checkpoint) -> tuple[int, int]:
    """Parameters of a model, and how many of them one token uses."""
    model_map = weights.model_map
    sizes = {key: math.prod(weights.shape(key)) for key in weights}
    experts = model_map.experts(weights)
    selected = int(weights.config["num_experts_per_tok"])
    idle = 0.0
    for key, size in sizes.items():
        role = model_map.classify(key)
        if role.role is Role.EXPERT and role.layer is not None:
            idle += size * (1 - selected / experts[role.layer])
    return sum(sizes.values()), round(sum(sizes.values()) - idle)


def stored_names(directory: Path) -> list[str]:
    """Names of the tensors in a directory's weight files, as they stand there."""
    names: list[str] = []
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    return names


def check_classic(names: Sequence[str], model_map: ModelMap) -> None:
    """Assert that tensors have the family's classic per-expert names, which other readers know.

    Raises:
        CheckpointError: One has another name, such as that of stacked experts, or a layer is incomplete.
    """
    model_map.experts(names)


def _write_weights(model_dir: Path, directory: Path) -> None:
    config = read_config(model_dir)
    model_map = ModelMap(str(config.get("model_type")))
    if _is_classic(stored_names(model_dir), model_map):
        for path in [*model_dir.glob("*.safetensors"), *model_dir.glob("*.safetensors.index.json")]:
            _link(path, directory / path.name)
        write_config(directory, config)
    else:
        write_checkpoint(directory, open_checkpoint(model_dir).items(), config)
    check_classic(stored_names(directory), model_map)


def _is_classic(names: Sequence[str], model_map: ModelMap) -> bool:
    try:
        check_classic(names, model_map)
    except CheckpointError:
        return False
    return True


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:     # another file system, or one without hard links
        shutil.copyfile(source, target)


def _write_tokenizer(tokenizer_dir: Path, directory: Path, most_positions: int) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir, local_files_only=True)
    expected = tokenizer(list(_PROBE))["input_ids"]
    tokenizer.model_max_length = most_positions
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        # The name that transformers 4 and its readers know the same class by.
        write_json(path, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    again = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if again(list(_PROBE))["input_ids"] != expected or again.eos_token_id != tokenizer.eos_token_id:
        raise RunError("the exported tokeniser does not give the tokens that the model was trained on")
    return again


def _write_configs(tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, directory: Path) -> None:
    eos, bos, pad = (
        tokenizer.eos_token_id if token is None else token
        for token in (None, tokenizer.bos_token_id, tokenizer.pad_token_id))
    name = str(dtype).removeprefix("torch.")
    values = config_values(AutoConfig.from_pretrained(directory, local_files_only=True))
    # No padding token in here: transformers would leave that token's embedding out of any further training.
    values |= {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": None, "dtype": name}
    # Where readers older than transformers 5 look for the two.
    values |= {"torch_dtype": name, "rope_theta": values["rope_parameters"]["rope_theta"]}
    write_config(directory, values)
    GenerationConfig(
        bos_token_id=bos, eos_token_id=eos, pad_token_id=pad, do_sample=True, temperature=0.8, top_p=0.95,
    ).save_pretrained(directory)


def _verified(model_dir: Path, directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    expected = _probe_logits(load_model(model_dir, dtype))
    model = load_model(directory, dtype)
    if not torch.equal(_probe_logits(model), expected):
        raise RunError(f"the exported model in {directory} does not give the trained model's logits")
    return model


@torch.inference_mode()
def _probe_logits(model: PreTrainedModel) -> Tensor:
    length = min(64, int(model.config.max_position_embeddings))
    tokens = torch.arange(2 * length).mul(7919).remainder(int(model.config.vocab_size)).view(2, length)
    logits: Tensor = model.eval()(input_ids=tokens, use_cache=False).logits
    return logits
