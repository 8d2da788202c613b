"""Write a GGUF file as a Hugging Face directory, which a run can start from: `python -m moedisco_ray.models.gguf FILE DIRECTORY`.

transformers reads the file and dequantises its weights to fp32. This is a program of its own, so that the memory of the whole model
is free again before the run begins, and so that a caller needs no torch.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moedisco_ray.models.checkpoint import write_config
from moedisco_ray.models.tokenizer_directories import save_tokenizer

_NAME = "model.gguf"


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
    # `save_pretrained` refuses a model that was read from a GGUF file.
    save_torch_state_dict(model.state_dict(), directory)
    local = ("quantization_config", "_name_or_path", "_model_name_or_path")
    values = {name: value for name, value in model.config.to_dict().items() if name not in local}
    write_config(directory, values | {"architectures": [type(model).__name__]})
    save_tokenizer(tokenizer, directory)


if __name__ == "__main__":
    write_directory(Path(sys.argv[1]), Path(sys.argv[2]))
