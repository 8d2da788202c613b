"""Write a GGUF file as a Hugging Face directory, which a run can start from: `python -m moedisco_ray.models.gguf FILE DIRECTORY`.

transformers reads the file and dequantises its weights to fp32. This is a program of its own, so that the memory of the whole model
is free again before the run begins, and so that a caller needs no torch.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import gguf
import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moedisco_ray.models.checkpoint import write_config
from moedisco_ray.models.tokenizer_directories import save_tokenizer

_NAME = "model.gguf"
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""Names of llama.cpp for tokenizers that split off each digit before they split as GPT-2 does; transformers forgets the digits."""


def write_directory(file: Path, directory: Path) -> None:
    """Write the configuration, the tokenizer and the dequantised weights of a GGUF file.

    Args:
        file: The GGUF file.
        directory: An empty directory.
    """
    with tempfile.TemporaryDirectory() as alone:    # transformers also reads other files that are next to the model
        (Path(alone) / _NAME).symlink_to(file.absolute())
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            alone, gguf_file=_NAME, dtype=torch.float32, local_files_only=True, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=_NAME, local_files_only=True, trust_remote_code=False)
    split = gguf.GGUFReader(file).get_field("tokenizer.ggml.pre")
    if split is not None and split.contents() in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    # `save_pretrained` refuses a model that was read from a GGUF file.
    # Of tied weights the embedding is kept, as transformers does.
    save_torch_state_dict(model.state_dict(), directory, shared_tensors_to_discard=[*model.all_tied_weights_keys])
    local = ("quantization_config", "_name_or_path", "_model_name_or_path")
    values = {name: value for name, value in model.config.to_dict().items() if name not in local}
    write_config(directory, values | {"architectures": [type(model).__name__]})
    save_tokenizer(tokenizer, directory)


if __name__ == "__main__":
    write_directory(Path(sys.argv[1]), Path(sys.argv[2]))
