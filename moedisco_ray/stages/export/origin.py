"""Parts of the exported directory that come from the model that the run started from."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedTokenizerBase

from moedisco_ray.core.config import EXPERT_COUNTS
from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.core.store.artifacts import read_json, write_json
from moedisco_ray.core.store.read_roots import opened
from moedisco_ray.models import STORED_DTYPES, read_config, read_generation_config, stored_quantisation

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_GENERATION = "generation_config.json"
_LICENCE_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Origin:
    """The model that a run started from.

    Attributes:
        directory: A Hugging Face model directory.
        own_tokens: Whether the run kept the model's tokenizer, so that token ids still have the same meaning.
    """

    directory: Path
    own_tokens: bool = True

    def dtype(self) -> torch.dtype:
        """Dtype of the model: bf16 or fp16 if `config.json`, or else the first tensor, has it; otherwise fp32.

        A model with quantised weights is read in bf16.
        """
        if stored_quantisation(self.directory) is not None:
            return torch.bfloat16
        config = read_config(self.directory)
        named = config.get("dtype") or config.get("torch_dtype")
        if named is not None:
            return _NAMES.get(str(named), torch.float32)
        path = min(self.directory.glob("*.safetensors"), default=None)
        if path is None:
            raise CheckpointError("checkpoint", str(self.directory), "holds no safetensors file")
        with opened(path) as found, safe_open(found, framework="pt") as file:
            return STORED_DTYPES.get(file.get_slice(min(file.keys())).get_dtype(), torch.float32)

    def config(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The `config.json` of the finished model: the trained model's values, completed from the origin's file.

        If the origin is of the same family, its fields that `values` lacks are added. (If it is a dense model, `values`
        has its fields already.) The BOS, EOS and padding tokens come from the origin's file if the run kept its
        tokenizer, else from the tokenizer, and never from the defaults of the model's class.

        Args:
            values: The `config.json` of the trained model, with the tokens of its tokenizer.
        """
        # The number of experts may have two names in the file, and a sub-model has fewer.
        raw = {key: value for key, value in read_config(self.directory).items() if key not in EXPERT_COUNTS}
        kept = {**raw, **values} if raw.get("model_type") == values.get("model_type") else dict(values)
        named = {name: raw[name] for name in _TOKENS if self.own_tokens and raw.get(name) is not None}
        return kept | {name: values.get(name) for name in _TOKENS} | named

    def write_generation_config(self, config: Mapping[str, Any], directory: Path) -> None:
        """Write `generation_config.json`: a copy of the origin's file, or a new file if the origin has none.

        In a copy, the special tokens are replaced by those in `config` if the tokenizer was replaced. If the origin's
        file names no end-of-text token, the special tokens that it lacks are added.

        Raises:
            CheckpointError: The origin's file is broken.
        """
        settings, tokens = read_generation_config(self.directory), {name: config.get(name) for name in _TOKENS}
        if settings is None:
            GenerationConfig(**tokens).save_pretrained(directory)
            return
        if self.own_tokens and settings.get("eos_token_id") is not None:
            with opened(self.directory / _GENERATION) as found:
                shutil.copyfile(found, directory / _GENERATION)
            return
        named = {name: value for name, value in settings.items() if self.own_tokens and value is not None}
        write_json(directory / _GENERATION, settings | tokens | named)

    def copy_licences(self, directory: Path) -> None:
        """Copy the licence files."""
        for path in (path for pattern in _LICENCE_PATTERNS for path in self.directory.glob(pattern) if path.is_file()):
            with opened(path) as found:
                shutil.copyfile(found, directory / path.name)


def tokens_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The BOS, EOS and padding tokens for a `config.json`, from a tokenizer.

    The padding token is None, because transformers would not train its embedding.
    """
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    return {"bos_token_id": eos if bos is None else bos, "eos_token_id": eos, "pad_token_id": None}


def for_all_readers(values: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Convert values of a `config.json` for transformers 4 and 5: renamed fields get both names."""
    name = str(dtype).removeprefix("torch.")
    rope = dict(values["rope_parameters"])
    theta = rope.pop("rope_theta")
    scaling = None if rope.get("rope_type", "default") == "default" else rope
    return {**values, "dtype": name, "torch_dtype": name, "rope_theta": theta, "rope_scaling": scaling}


def end_tokens(directory: Path) -> frozenset[int]:
    """End-of-text tokens in the `generation_config.json` of a model directory."""
    return frozenset(_as_list(GenerationConfig.from_pretrained(directory, local_files_only=True).eos_token_id))


def add_end_token(directory: Path, token: int) -> None:
    """Add an end-of-text token to the `generation_config.json` of a model directory, if it is not there."""
    settings = read_json(directory / _GENERATION)
    known = _as_list(settings.get("eos_token_id"))
    if token not in known:
        write_json(directory / _GENERATION, {**settings, "eos_token_id": [*known, token]})


def _as_list(tokens: list[int] | int | None) -> list[int]:
    if tokens is None:
        return []
    return tokens if isinstance(tokens, list) else [tokens]
