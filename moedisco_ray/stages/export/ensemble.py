"""The directory of sub-models that stay apart: the sub-models, the clusters' centres, and code that mixes predictions.

Shapes: V entries of the vocabulary, D dimensions of a vector, L positions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.numpy import load_file
from torch import Tensor
from transformers import PreTrainedModel

from moedisco_ray.core.config import LocalInit, Model
from moedisco_ray.core.config.start_files import start_directory
from moedisco_ray.core.limits import ENSEMBLE_BLOCK, ENSEMBLE_TEMPERATURE, SAMPLE_TOKENS
from moedisco_ray.core.records.events import Emit, StageProgress, discard
from moedisco_ray.core.records.export_summary import ExportSummary
from moedisco_ray.core.records.run_record import RunReport
from moedisco_ray.models import open_checkpoint, read_config, write_config
from moedisco_ray.models.streamed import device_of_model, open_streamed
from moedisco_ray.models.tokenizer_directories import load_pretrained
from moedisco_ray.stages.export import modeling_ensemble
from moedisco_ray.stages.export.card import ensemble_card
from moedisco_ray.stages.export.directory import (
    ExportDtype,
    check_logits,
    count_parameters,
    link,
    rounded_to,
    stored_dtype,
    write_configs,
    write_tokenizer,
    write_weights,
)
from moedisco_ray.stages.export.front_matter import facts_of
from moedisco_ray.stages.export.modeling_ensemble import Array, EnsembleCache, EnsembleForCausalLM, Router, unit_length
from moedisco_ray.stages.export.origin import Origin, add_end_token, end_tokens
from moedisco_ray.stages.export.samples import NextLogits, continue_prompts
from moedisco_ray.stages.scoring import default_dtype
from moedisco_ray.stages.text.given_tokens import GivenTokens
from moedisco_ray.stages.text.tokenizer import ENCODING, Encoder

CODE = Path(modeling_ensemble.__file__)
"""File that the directory's `config.json` names."""
ROUTER = "router"
"""Folder with the clusters' centres, and what computes the vector of a text."""
_COPIED = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
"""Fields of a sub-model's `config.json` that the ensemble has too."""


def export_submodels(
    submodels: Sequence[Path],
    *,
    clusters: Path,
    tokenizer: Path,
    directory: Path,
    report: RunReport,
    prompts: Sequence[str],
    seed: int,
    start: Model,
    own_tokens: bool,
    dtype: ExportDtype,
    device: str,
    datasets: Sequence[str] = (),
    has_turns: bool = False,
    events: Emit = discard,
) -> dict[str, Any]:
    """Write the trained sub-models as one model of transformers, and let it continue a few prompts.

    Args:
        submodels: Directories of the trained sub-models, in the clusters' order.
        clusters: The run's cluster model, whose clusters have centres.
        tokenizer: The corpus' tokenizer.
        directory: Directory to write.
        report: The run's report, for the model card.
        prompts: Texts to continue.
        seed: Seed of the run.
        start: The run's model section, which names what the run started from.
        own_tokens: Whether the run kept the tokenizer of the model that it started from.
        dtype: Dtype of the weights; see `directory.export`.
        device: Device that the samples are computed on.
        datasets: Data sets of the Hugging Face hub that the run trained on, for the model card.
        has_turns: Whether the run trains on conversations, or on prompts with completions.
        events: Takes `stage_progress` events.

    Returns:
        As `directory.export`, with the parameters of all sub-models together, and `submodels`, their number.

    Raises:
        RunError: A written sub-model's logits are not bit-identical to the trained one's.
    """
    advance = StageProgress(events, "export", "files written").add
    origin = Origin(start_directory(start.init), own_tokens) if isinstance(start.init, LocalInit) else None
    given, turn_end = load_pretrained(tokenizer), GivenTokens(tokenizer).turn_end() if has_turns else None
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copytree(clusters, directory / ROUTER, copy_function=_linked)
    if _settings(directory / ROUTER)["kind"] == "tfidf_svd":  # it reads text, not tokens
        shutil.copyfile(tokenizer / ENCODING, directory / ROUTER / ENCODING)
    total, active, size, rounded = 0, 0, 0, None
    for k, source in enumerate(submodels):
        part, trained = directory / str(k), open_checkpoint(source)
        part.mkdir()
        stored_in, as_they_are = stored_dtype(trained, dtype, origin)
        write_weights(trained, part, None if as_they_are else stored_in)
        write_configs(given, stored_in, part, origin)
        if turn_end is not None:
            add_end_token(part, turn_end)
        check_logits(source, part, stored_in)
        parameters, used = count_parameters(trained)
        total, active = total + parameters, active + used
        size += sum(path.stat().st_size for path in part.glob("*.safetensors"))
        rounded = rounded or rounded_to(stored_in, as_they_are=as_they_are)
        advance(sum(1 for _ in part.iterdir()))
    positions = _write_config(directory, len(submodels), Encoder(tokenizer).prefix)
    written = write_tokenizer(tokenizer, directory, positions if origin is None else None)
    shutil.copyfile(CODE, directory / CODE.name)
    if origin is not None:
        origin.copy_licences(directory)
    figures = {
        "parameters": total,
        "active_parameters": active,
        "submodels": len(submodels),
        "rounded_to": rounded,
        "facts": facts_of(start, list(datasets)).to_json(),
        "bytes": size,
        "samples": continue_prompts(
            open_ensemble(directory, device),
            written,
            prompts,
            SAMPLE_TOKENS,
            seed,
            prefix=Encoder(tokenizer).prefix,
            ends=end_tokens(directory / "0"),
            begin=_reading,
        )
        if prompts
        else [],
    }
    card = ensemble_card(report, ExportSummary.model_validate(figures))
    (directory / "README.md").write_text(card, encoding="utf-8")
    return figures


def open_ensemble(directory: Path, device: str) -> EnsembleForCausalLM:
    """Open the directory of an ensemble for a few tokens: one layer of one sub-model is on the device at a time.

    Its router computes on the CPU. Sub-models that are small stay in a CPU's memory; on a GPU, where each could take a
    share of the memory, none does.
    """
    config = modeling_ensemble.EnsembleConfig.from_pretrained(directory)
    resident = False if torch.device(device).type == "cuda" else None
    submodels = [
        open_streamed(
            directory / str(k), dtype=default_dtype(device), device=device, resident=resident, few_tokens=True
        )
        for k in range(config.num_submodels)
    ]
    settings = _settings(directory / ROUTER)
    is_model = settings["kind"] == modeling_ensemble.STATES
    vector = _StreamedStates(directory / ROUTER, settings["max_tokens"]) if is_model else None
    return EnsembleForCausalLM(config, submodels, Router(directory / ROUTER, config.router_temperature, vector))


class _StreamedStates:
    """Vectors as of `modeling_ensemble.HiddenState`, from a model that has one layer in memory at a time."""

    def __init__(self, directory: Path, max_tokens: int) -> None:
        self._model = open_streamed(directory / "model", dtype=default_dtype("cpu"), few_tokens=True)
        self._centre_D = load_file(directory / "vectoriser.safetensors")["centre"]
        self._max_tokens = max_tokens

    @torch.inference_mode()
    def __call__(self, tokens: Sequence[int]) -> Array:
        """The vector [D] of a text's tokens."""
        ids_BL = torch.tensor([tokens[: self._max_tokens]])
        hidden_LD = self._model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state[0]
        return unit_length(hidden_LD.float().mean(dim=0).numpy() - self._centre_D)


def _reading(model: PreTrainedModel) -> NextLogits:
    """Let an ensemble read a text from its beginning; its router reads all of it, its sub-models what is new."""
    if not isinstance(model, EnsembleForCausalLM):
        raise TypeError(type(model).__name__)
    cache, device = EnsembleCache(model.submodels), device_of_model(cast("PreTrainedModel", model.submodels[0]))

    def read(ids: list[int], new: int) -> Tensor:
        ids_BL = torch.tensor([ids], device=device)
        mixed = model(ids_BL[:, -new:], document_ids=ids_BL, logits_to_keep=1, past_key_values=cache)
        logits_V: Tensor = mixed.logits[0, -1]
        return logits_V

    return read


def _write_config(directory: Path, count: int, document_start: int) -> int:
    """Write the `config.json` of an ensemble of sub-models in folders; returns their maximum number of positions."""
    submodel = read_config(directory / "0")
    write_config(
        directory,
        {
            "model_type": modeling_ensemble.EnsembleConfig.model_type,
            "architectures": [EnsembleForCausalLM.__name__],
            "auto_map": {
                "AutoConfig": f"{CODE.stem}.{modeling_ensemble.EnsembleConfig.__name__}",
                "AutoModelForCausalLM": f"{CODE.stem}.{EnsembleForCausalLM.__name__}",
            },
            "num_submodels": count,
            "router_block": ENSEMBLE_BLOCK,
            "router_temperature": ENSEMBLE_TEMPERATURE,
            "document_start": document_start,
            **{field: submodel.get(field) for field in _COPIED},
        },
    )
    return int(submodel["max_position_embeddings"])


def _settings(router: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((router / "vectoriser.json").read_text(encoding="utf-8"))
    return found


def _linked(source: str, target: str) -> str:
    link(Path(source), Path(target))
    return target
