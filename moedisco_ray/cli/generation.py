"""What the commands that generate text have in common. Import this module only to generate: it imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from moedisco_ray.cli.arguments import Place
from moedisco_ray.core.errors import ConfigError
from moedisco_ray.core.store.run_models import is_ensemble
from moedisco_ray.models.chat_templates import Part, TemplateError, render
from moedisco_ray.models.hf import no_progress_bar
from moedisco_ray.models.streamed import Offload, open_offloaded
from moedisco_ray.models.tokenizer_directories import load_pretrained
from moedisco_ray.stages.export.modeling_ensemble import EnsembleForCausalLM

Message = dict[str, str]


def checked_device(device: str) -> str:
    """The device that `--device` names: cpu, cuda, cuda:N, or auto, which is a GPU if one is visible.

    Raises:
        ConfigError: There is no such device here.
    """
    gpus = torch.cuda.device_count()
    if device == "auto":
        return "cuda" if gpus else "cpu"
    if device in ("cpu", *(["cuda"] if gpus else []), *(f"cuda:{i}" for i in range(gpus))):
        return device
    if not gpus:
        raise ConfigError("--device", device, "no GPU is visible here; use --device cpu")
    visible = "1 GPU is" if gpus == 1 else f"{gpus} GPUs are"
    raise ConfigError("--device", device, f"{visible} visible here; use --device cpu, cuda or cuda:N")


def open_model(
    directory: Path, *, device: str, experts_on: Place = "device", resident_experts: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    Args:
        directory: An exported model with its tokenizer.
        device: Device that runs the model; `auto` is a GPU if one is visible.
        experts_on: Where experts are while no token selects them.
        resident_experts: Number of experts per layer that stay on the device; see `Offload`.

    Raises:
        CheckpointError: Experts are not on the device, and the model's family is not supported or its tensors do not
            fit.
        ConfigError: The device does not exist here, the directory holds no tokenizer, or the options contradict each
            other.
    """
    device = checked_device(device)
    if resident_experts is not None and experts_on == "device":
        raise ConfigError(
            "--resident-experts",
            resident_experts,
            "all experts are on the device; add --experts-on cpu or --experts-on disk",
        )
    apart = is_ensemble(directory)
    if apart and experts_on != "device":
        raise ConfigError("--experts-on", experts_on, "is impossible with sub-models that stay apart; leave it out")
    tokenizer = load_pretrained(directory, "RUN_DIR")
    with no_progress_bar():
        if apart:
            # Our own class, so that no code in the directory runs.
            model: PreTrainedModel = EnsembleForCausalLM.from_pretrained(
                directory, dtype="auto", local_files_only=True, use_safetensors=True
            ).to(device)
        elif experts_on == "device":
            model = (
                AutoModelForCausalLM.from_pretrained(
                    directory, dtype="auto", local_files_only=True, trust_remote_code=False, use_safetensors=True
                )
                .to(device)
                .eval()
            )
        else:
            model = open_offloaded(directory, Offload(experts_on, resident_experts), device=device)
    return model, tokenizer


def sampling(temperature: float | None) -> dict[str, Any]:
    """Arguments of `generate` for a temperature; 0 takes the likeliest token, None uses the model's own settings."""
    if temperature is None:
        return {}
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature}


def document_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text as the beginning of a document."""
    start = tokenizer(text)["input_ids"]
    before = [] if start[:1] == [tokenizer.bos_token_id] else [tokenizer.eos_token_id]
    return [*before, *start]


def templated_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Tokens of a conversation and of the beginning of its next answer, in the chat template.

    Raises:
        ConfigError: The template refuses the conversation, or takes too much time or memory.
        RunError: The process that renders was ended by something else.
    """
    try:
        text = render(tokenizer, messages, [Part(len(messages), prompt=True)])[0].text
    except TemplateError as error:
        raise ConfigError("chat template", tokenizer.name_or_path, f"refuses these messages ({error})") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
