"""Write a GGUF file as a Hugging Face directory, from which a run can start.

Run it as `python -m moedisco_ray.contrib.gguf.reading FILE DIRECTORY`.

transformers reads the file and dequantises its weights to fp32.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.models.checkpoint import write_config
from moedisco_ray.models.hf import config_values, from_values, save_model
from moedisco_ray.models.tokenizer_directories import save_tokenizer

_NAME = "model.gguf"
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Names of llama.cpp for tokenizers that split off each digit before they split as GPT-2 does; transformers forgets the
digits."""
_SIZES = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""Names in transformers of fields that it does not read."""
_SCALING = {
    "scaling.type": "rope_type",
    "scaling.factor": "factor",
    "scale_linear": "factor",
    "scaling.original_context_length": "original_max_position_embeddings",
    "scaling.yarn_beta_fast": "beta_fast",
    "scaling.yarn_beta_slow": "beta_slow",
}
"""Names in transformers of rotary parameters, which it does not read."""
_NO_SCALING = {"dimension_count", "dimension_sections", "freq_base", "scaling.finetuned"}
_DIVISORS = "rope_freqs.weight"
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The scaling of Llama 3.1 to 3.3; a file holds only the divisors that follow from it."""
_REMEDY = "name the Hugging Face directory of the model instead"


def write_directory(file: Path, directory: Path) -> None:
    """Write the configuration, the tokenizer and the dequantised weights of a GGUF file.

    Args:
        file: The GGUF file.
        directory: An empty directory.

    Raises:
        CheckpointError: transformers computes something else with the file than llama.cpp.
    """
    reader = gguf.GGUFReader(file)
    with tempfile.TemporaryDirectory() as alone:  # transformers also reads other files that are next to the model
        (Path(alone) / _NAME).symlink_to(file.absolute())
        config = AutoConfig.from_pretrained(alone, gguf_file=_NAME, local_files_only=True, trust_remote_code=False)
        _complete(config, reader)
        model, info = AutoModelForCausalLM.from_pretrained(
            alone,
            gguf_file=_NAME,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        _check_weights(model, info["missing_keys"], reader)
        tokenizer = AutoTokenizer.from_pretrained(
            alone, gguf_file=_NAME, local_files_only=True, trust_remote_code=False
        )
    split = reader.get_field("tokenizer.ggml.pre")
    if split is not None and split.contents() in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    # `save_pretrained` refuses a model that was read from a GGUF file.
    if config.model_type in DECLARATIONS:
        save_model(model, directory)
        values = config_values(model.config)
    else:  # Of tied weights the embedding is kept, as transformers does.
        save_torch_state_dict(model.state_dict(), directory, shared_tensors_to_discard=[*model.all_tied_weights_keys])
        values = model.config.to_dict() | {"architectures": [type(model).__name__]}
    local = ("quantization_config", "_name_or_path", "_model_name_or_path")
    write_config(directory, {name: value for name, value in values.items() if name not in local})
    save_tokenizer(tokenizer, directory)


def frequency_divisors(config: Mapping[str, Any]) -> Tensor | None:
    """Divisor of each frequency for `llama3` scaling in llama.cpp (Llama 3.1, arXiv 2407.21783); otherwise None."""
    scaled = from_values(config)
    rotation = scaled.rope_parameters
    if rotation.get("rope_type") != "llama3":
        return None
    unscaled = from_values({**config, "rope_parameters": {**rotation, "factor": 1.0}})
    frequencies, found = (ROPE_INIT_FUNCTIONS["llama3"](each, None)[0] for each in (unscaled, scaled))
    return frequencies / found


def _complete(config: PretrainedConfig, reader: gguf.GGUFReader) -> None:
    """Add to a configuration what transformers does not read from a GGUF file."""
    architecture = str(reader.fields["general.architecture"].contents())
    fields = {
        name.removeprefix(f"{architecture}."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(f"{architecture}.")
    }
    if architecture == "llama" and fields.get("expert_count"):
        raise CheckpointError(
            "expert_count",
            fields["expert_count"],
            f"is that of a Mixtral, which transformers reads as a dense Llama; {_REMEDY}",
        )
    config.update({name: fields[field] for field, name in _SIZES.items() if field in fields})
    if config.model_type == "qwen2_moe":
        config.qkv_bias = any(tensor.name.endswith("attn_q.bias") for tensor in reader.tensors)
    found = {name.removeprefix("rope."): value for name, value in fields.items() if name.startswith("rope.")}
    if "dimension_sections" in found:  # matter to images alone, and a small model has fewer than transformers expects
        config.rope_parameters = {
            name: value for name, value in config.rope_parameters.items() if name != "mrope_section"
        }
    scaling = _scaling({name: value for name, value in found.items() if name not in _NO_SCALING})
    divisors = [torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors if tensor.name == _DIVISORS]
    if divisors and scaling:
        raise CheckpointError(
            "rope.scaling.type", scaling["rope_type"], f"is a second scaling besides {_DIVISORS}; {_REMEDY}"
        )
    if divisors:
        scaling = _LLAMA3 | {"factor": float(divisors[0].max())}
    if scaling:
        config.rope_parameters = {**config.rope_parameters, **scaling}
    computed = frequency_divisors(config.to_dict()) if divisors else None
    if computed is not None and not torch.allclose(computed, divisors[0], rtol=1e-3):
        raise CheckpointError(
            _DIVISORS,
            float(divisors[0].max()),
            f"is the largest of divisors that are not those of Llama 3.1 to 3.3; {_REMEDY}",
        )


def _scaling(found: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary scaling that a file's fields describe, under the names of transformers; nothing if there is none."""
    kind = found.get("scaling.type", "linear")  # what llama.cpp takes for granted
    if not found or kind == "none":
        return {}
    if kind not in ("linear", "yarn"):
        raise CheckpointError("rope.scaling.type", kind, f"is known from GGUF files only as linear or yarn; {_REMEDY}")
    if strange := sorted(found.keys() - _SCALING.keys()):
        raise CheckpointError(
            f"rope.{strange[0]}", found[strange[0]], f"is no rotary parameter that is known here; {_REMEDY}"
        )
    return {"rope_type": kind, "factor": 1.0, **{_SCALING[name]: value for name, value in found.items()}}


def _check_weights(model: PreTrainedModel, missing: set[str], reader: gguf.GGUFReader) -> None:
    """Check that transformers found every weight of the model, and has read every tensor of the file."""
    if missing:
        raise CheckpointError("tensor", min(missing), f"is not found in the file by transformers; {_REMEDY}")
    # Layers that predict further tokens follow the last one, and transformers leaves them out.
    others = (_DIVISORS, f"blk.{model.config.num_hidden_layers}.")
    in_file = sum(int(tensor.n_elements) for tensor in reader.tensors if not tensor.name.startswith(others))
    read = sum(tensor.numel() for key, tensor in model.state_dict().items() if key not in model.all_tied_weights_keys)
    if in_file != read:
        raise CheckpointError("tensors", in_file, f"values are in the file, but transformers reads {read}; {_REMEDY}")


if __name__ == "__main__":
    write_directory(Path(sys.argv[1]), Path(sys.argv[2]))
