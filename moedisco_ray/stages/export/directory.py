"""The exported directory: weights, configuration, tokenizer, generation defaults, model card; and its checks."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from moedisco_ray.core.errors import CheckpointError, RunError
from moedisco_ray.core.limits import SAMPLE_TOKENS
from moedisco_ray.core.records.events import Advance, no_advance
from moedisco_ray.core.records.export_summary import ExportSummary, ModelFacts
from moedisco_ray.core.records.run_record import RunReport
from moedisco_ray.core.store.manifests import ADAPTER_FOLDER
from moedisco_ray.models import (
    Checkpoint,
    ModelMap,
    Role,
    Stored,
    config_values,
    open_checkpoint,
    same_bits,
    write_checkpoint,
    write_config,
)
from moedisco_ray.models.checkpoint import open_file
from moedisco_ray.models.mapped_pages import map_pages
from moedisco_ray.models.streamed import open_streamed
from moedisco_ray.models.tokenizer_directories import copy_tokenizer, load_pretrained, reads_as, save_tokenizer
from moedisco_ray.stages.export.card import model_card
from moedisco_ray.stages.export.origin import Origin, add_end_token, end_tokens, for_all_readers, tokens_of
from moedisco_ray.stages.export.samples import continue_prompts

_SUFFIXES = {".safetensors", ".json", ".md", ".jinja", ".model", ".tiktoken", ".txt"}
_LICENCE_PREFIXES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_PROBE_TOKENS = 4
"""Number of tokens whose logits are compared: few, because each reads the experts that it selects."""
ExportDtype = Literal["auto", "fp32", "bf16", "fp16"]
"""Values of `export.dtype`."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(
    model_dir: Path,
    tokenizer_dir: Path,
    directory: Path,
    report: RunReport,
    *,
    prompts: Sequence[str] = (),
    seed: int = 0,
    prefix: int | None = None,
    origin: Origin | None = None,
    facts: ModelFacts | None = None,
    dtype: ExportDtype = "auto",
    device: str = "cpu",
    turn_end: int | None = None,
    advance: Advance = no_advance,
) -> dict[str, Any]:
    """Write the exported directory, read it again, and compare it with the trained model: every tensor, and logits.

    The export keeps these parts of the model that the run started from: configuration fields, tokenizer, chat template,
    end-of-text tokens, generation settings, dtype and licence. Weight files that already have the right dtype and one
    tensor per expert, under the family's usual names, are hard-linked, or copied where hard links are not possible.
    Other weights are rewritten tensor by tensor. The logits are those of a few tokens: with the tensors, they show that
    the configuration is right. For them and for the samples, one decoder layer is in memory at a time, with the experts
    that are selected, unless the whole model is small.

    Args:
        model_dir: The trained model.
        tokenizer_dir: A directory that `AutoTokenizer` loads.
        directory: Directory to write; created if it is missing.
        report: The run's report, for the model card.
        prompts: Texts that the finished model continues, for the model card.
        seed: Seed of the run.
        prefix: Token before a document, for the samples. By default it is the token that ends a document.
        origin: The model that the run started from; None if it started from random weights.
        facts: Base model, licence, languages and data sets, for the model card.
        dtype: Dtype of the weights; `auto` means the dtype of `origin`, or, if that is None, the dtype of the trained
            model.
        device: Device that the samples are computed on. The comparison runs on the CPU, where results do not depend on
            timing.
        turn_end: Token after which an answer ends, if the run trained on conversations; generation ends there too.
        advance: Receives the number of files written.

    Returns:
        `parameters`, `active_parameters` (used by one token), `rounded_to` (the dtype that the trained weights were
        rounded to, or None if they were not), `bytes` of the weights, `adapter` (whether the fine-tune's adapters are
        there too), the `facts`, and `samples` [{prompt, text}].

    Raises:
        CheckpointError: The trained model's tensors are not exactly those of its family.
        RunError: The written model's logits are not bit-identical to the trained model's, or the tokenizers give
            different tokens.
    """
    directory.mkdir(parents=True, exist_ok=True)
    trained = open_checkpoint(model_dir)
    stored_in, as_they_are = stored_dtype(trained, dtype, origin)
    write_weights(trained, directory, None if as_they_are else stored_in)
    advance(weight_files := _files(directory))
    weights = open_checkpoint(directory)
    positions = int(weights.config["max_position_embeddings"])
    tokenizer = write_tokenizer(tokenizer_dir, directory, positions if origin is None else None)
    write_configs(tokenizer, stored_in, directory, origin)
    if turn_end is not None:
        add_end_token(directory, turn_end)
    advance(_files(directory) - weight_files)
    check_logits(model_dir, directory, stored_in)
    adapter = _link_adapter(model_dir, directory)
    model = open_streamed(directory, dtype=stored_in, device=device, few_tokens=True)
    total, active = count_parameters(weights)
    figures = {
        "parameters": total,
        "active_parameters": active,
        "rounded_to": rounded_to(stored_in, as_they_are=as_they_are),
        "facts": (facts or ModelFacts()).to_json(),
        "bytes": sum(path.stat().st_size for path in directory.glob("*.safetensors")),
        "adapter": adapter,
        "samples": continue_prompts(
            model, tokenizer, prompts, SAMPLE_TOKENS, seed, prefix=prefix, ends=end_tokens(directory)
        ),
    }
    if origin is not None:
        origin.copy_licences(directory)
    (directory / "README.md").write_text(model_card(report, ExportSummary.model_validate(figures)), encoding="utf-8")
    if strange := sorted(path.name for path in directory.rglob("*") if path.is_file() and not _belongs(path)):
        raise RunError(f"the export holds a file of a kind that does not belong there: {strange[0]}")
    return figures


def stored_dtype(trained: Checkpoint, dtype: ExportDtype, origin: Origin | None) -> tuple[torch.dtype, bool]:
    """Dtype in which a trained model is stored, and whether its weights have it already; for `dtype` see `export`."""
    stored_in = _DTYPES.get(dtype) or (trained["model.norm.weight"].dtype if origin is None else origin.dtype())
    return stored_in, all(trained.dtype(key) == stored_in for key in trained if not trained.model_map.keeps_dtype(key))


def rounded_to(stored_in: torch.dtype, *, as_they_are: bool) -> str | None:
    """Name of the dtype that weights were rounded to; None if they were stored exactly."""
    return None if as_they_are or stored_in == torch.float32 else str(stored_in).removeprefix("torch.")


def count_parameters(weights: Checkpoint) -> tuple[int, int]:
    """Number of parameters of a model, in total and active per token."""
    model_map = weights.model_map
    sizes = {key: math.prod(weights.shape(key)) for key in weights}
    experts = model_map.experts(weights)
    selected = int(weights.config[model_map.family.router.top_k_field])
    idle = 0.0
    for key, size in sizes.items():
        role = model_map.classify(key)
        if role.role is Role.EXPERT and role.layer is not None:
            idle += size * (1 - selected / (experts[role.layer] or weights.shape(key)[0]))
    return sum(sizes.values()), round(sum(sizes.values()) - idle)


def stored_names(directory: Path) -> list[str]:
    """Names of the tensors in a directory's weight files, as stored."""
    names: list[str] = []
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names += file.keys()
    return names


def check_classic(names: Sequence[str], model_map: ModelMap) -> None:
    """Check that there is one tensor per expert, under the family's usual names, which other libraries read.

    Raises:
        CheckpointError: A tensor has another name, for example because experts are stacked, or a layer is incomplete.
    """
    model_map.experts(names)


def _files(directory: Path) -> int:
    return sum(1 for path in directory.iterdir() if path.is_file())


def _belongs(path: Path) -> bool:
    return path.suffix in _SUFFIXES or path.name.startswith(_LICENCE_PREFIXES)


def write_weights(trained: Checkpoint, directory: Path, dtype: torch.dtype | None) -> None:
    """Write a trained model's weights, one tensor per expert, in another dtype or, with None, as they are.

    Files that need no change are hard-linked, or copied where hard links are not possible. Other files are read again
    and compared with the trained model while the next one is written. One tensor is in memory at a time, and one that
    is compared.

    Raises:
        RunError: A file does not hold a tensor that was written to it.
    """
    if dtype is None and _is_classic(stored_names(trained.directory), trained.model_map):
        for path in [*trained.directory.glob("*.safetensors"), *trained.directory.glob("*.safetensors.index.json")]:
            link(path, directory / path.name)
        write_config(directory, trained.config)
    else:
        same, checks = open_checkpoint(trained.directory), []
        with contextlib.closing(trained.stream()) as stored, ThreadPoolExecutor(1, "compare") as thread:
            layout = trained.layout(dtype)
            tensors = ((key, tensor.to(layout[key].dtype)) for key, tensor in stored)
            write_checkpoint(
                directory,
                tensors,
                trained.config,
                layout=layout,
                written=lambda path, keys: checks.append(thread.submit(_compare, open_file(path), keys, same, layout)),
            )
        for check in checks:
            check.result()
    check_classic(stored_names(directory), trained.model_map)


def _compare(file: Any, keys: Sequence[str], trained: Checkpoint, layout: Mapping[str, Stored]) -> None:
    for key in keys:
        if not same_bits(map_pages(file.get_tensor(key)), map_pages(trained[key]).to(layout[key].dtype)):
            raise RunError(f"the exported tensor {key}, read again, is not the trained model's; is the disk broken?")


def _is_classic(names: Sequence[str], model_map: ModelMap) -> bool:
    try:
        check_classic(names, model_map)
    except CheckpointError:
        return False
    return True


def link(source: Path, target: Path) -> None:
    """Hard-link a file in place of another one, or copy it where hard links are not possible."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # the target is on another file system, or its file system has no hard links
        shutil.copyfile(source, target)


def _link_adapter(trained: Path, directory: Path) -> bool:
    """Link the adapters of a training, which the weights contain already; returns whether there are any."""
    files = list((trained / ADAPTER_FOLDER).glob("*"))
    for path in files:
        (directory / ADAPTER_FOLDER).mkdir(exist_ok=True)
        link(path, directory / ADAPTER_FOLDER / path.name)
    return bool(files)


def write_tokenizer(tokenizer_dir: Path, directory: Path, most_positions: int | None) -> PreTrainedTokenizerBase:
    """Copy a tokenizer; if `most_positions` is given, set it as the tokenizer's maximum length."""
    tokenizer = load_pretrained(tokenizer_dir)
    if most_positions is None:
        copy_tokenizer(tokenizer_dir, tokenizer, directory)
    else:
        tokenizer.model_max_length = most_positions
        save_tokenizer(tokenizer, directory)
    if not reads_as(directory, tokenizer):
        raise RunError("the exported tokenizer does not give the tokens that the model was trained on")
    return load_pretrained(directory)


def write_configs(
    tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, directory: Path, origin: Origin | None
) -> None:
    """Complete the `config.json` of a directory with weights, and write its `generation_config.json`."""
    values = config_values(AutoConfig.from_pretrained(directory, local_files_only=True)) | tokens_of(tokenizer)
    if origin is not None:
        values = origin.config(values)
        origin.write_generation_config(values, directory)
    else:
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        GenerationConfig(
            bos_token_id=values["bos_token_id"],
            eos_token_id=values["eos_token_id"],
            pad_token_id=pad,
            do_sample=True,
            temperature=0.8,
            top_p=0.95,
        ).save_pretrained(directory)
    write_config(directory, for_all_readers(values, dtype))


def check_logits(model_dir: Path, directory: Path, dtype: torch.dtype) -> None:
    """Check that an exported model gives the logits of the trained one for a few tokens, bit for bit.

    Raises:
        RunError: It does not.
    """
    expected, found = (
        _probe_logits(open_streamed(each, dtype=dtype, few_tokens=True)) for each in (model_dir, directory)
    )
    if not torch.equal(found, expected):
        raise RunError(f"the exported model in {directory} does not give the trained model's logits")


@torch.inference_mode()
def _probe_logits(model: PreTrainedModel) -> Tensor:
    tokens = torch.arange(_PROBE_TOKENS).mul(7919).remainder(int(model.config.vocab_size)).unsqueeze(0)
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits
