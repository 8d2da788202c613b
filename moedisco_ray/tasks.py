"""What the pipeline sends to a worker: plain values in, a directory or figures out. Each opens what it needs and nothing more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from moedisco_ray import decompose, evaluate, export, merge
from moedisco_ray.clustering import ClusterModel
from moedisco_ray.config import CheckpointInit, Merge, Model
from moedisco_ray.corpus import Encoder
from moedisco_ray.merge import Batch
from moedisco_ray.model_map import (
    ModelMap,
    config_values,
    group_size,
    hf_config,
    open_checkpoint,
    random_source,
    read_config,
    submodel_config,
    write_checkpoint,
)


def initial_moe(model: Model, tokenizer: Path, sequence_length: int, seed: int) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """The whole MoE before any training: its tensors, each read or drawn when it is asked for, and its `config.json`.

    Args:
        model: The run's model section.
        tokenizer: The corpus' tokeniser, which gives the vocabulary and the end-of-text token.
        sequence_length: Of training.
        seed: Of random tensors.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        ConfigError: The family cannot have these sizes.
    """
    if isinstance(model.init, CheckpointInit):
        return open_checkpoint(model.init.checkpoint), read_config(model.init.checkpoint)
    encoder = Encoder(tokenizer)
    config = config_values(hf_config(model.family, model.architecture, encoder.vocab_size, sequence_length, encoder.eos))
    return random_source(config, seed), config


def write_start(model: Model, tokenizer: Path, sequence_length: int, seed: int, clusters: int, directory: Path) -> None:
    """Write the common dense model: the backbone with the first group of experts, as they are before any training."""
    source, config = initial_moe(model, tokenizer, sequence_length, seed)
    experts = model.architecture.num_experts
    tensors = decompose.decompose(source, ModelMap(model.family), experts, clusters, 0)
    write_checkpoint(directory, tensors, submodel_config(config, group_size(experts, clusters)))


def write_submodels(
    model: Model, tokenizer: Path, sequence_length: int, seed: int, clusters: int, trained_seed: Path | None, directory: Path,
) -> dict[str, Any]:
    """Write every sub-model before its training, grown from the trained seed where there is one.

    Returns:
        `bytes`: of each sub-model.
    """
    source, config = initial_moe(model, tokenizer, sequence_length, seed)
    if trained_seed is not None:
        source = decompose.with_seed(open_checkpoint(trained_seed), source, ModelMap(model.family))
    return {"bytes": decompose.write_submodels(source, config, clusters, directory)}


def merge_submodels(
    model: Model, tokenizer: Path, sequence_length: int, seed: int, submodels: Sequence[Path], start: Path,
    tokens: Sequence[int], batches: Sequence[Batch], held_out: Sequence[NDArray[np.int32]], settings: Merge, directory: Path,
) -> dict[str, Any]:
    """Write the merged MoE with its calibrated router.

    Args:
        model: The run's model section.
        tokenizer: The corpus' tokeniser.
        sequence_length: Of training.
        seed: Of random router rows, and of what DARE drops.
        submodels: The trained sub-models, in the clusters' order.
        start: One of them before its training.
        tokens: What each was trained on.
        batches: Calibration data.
        held_out: Windows of text [L] on which recipes for the backbone are compared.
        settings: The run's merge section.
        directory: Where to.

    Returns:
        Figures per layer; `merge.json` beside the model also says what became of each tensor.
    """
    _, config = initial_moe(model, tokenizer, sequence_length, seed)
    eos = Encoder(tokenizer).eos

    def loss(merged: PreTrainedModel) -> float:
        nats_N = evaluate.document_nats(merged, held_out, eos=eos, sequence_length=sequence_length)
        return float(nats_N.sum()) / sum(map(len, held_out))

    router = merge.RouterSettings(settings.router, settings.match_load, settings.match_scale, seed)
    result = merge.build_merged(
        submodels, start, config, merge.recipes(settings, tokens, seed), batches, directory, router=router, loss=loss)
    return {**result, "tensors": len(result["tensors"])}


def measure(
    models: Mapping[str, Path], submodels: Sequence[Path], corpus: Path, cluster_model: Path, sequence_length: int, max_tokens: int,
    device: str,
) -> dict[str, Any]:
    """Perplexity and bits per byte of every model of the run, and the routers of the finished one.

    Args:
        models: The model that each stage made.
        submodels: The trained sub-models; each is measured on its own cluster.
        corpus: The corpus artifact.
        cluster_model: Tells which cluster a validation document belongs to.
        sequence_length: Of training.
        max_tokens: Most validation tokens to measure on.
        device: Where.
    """
    documents = evaluate.load_documents(sorted((corpus / "validation").glob("*.parquet")), max_tokens)
    labels_N = ClusterModel.load(cluster_model).assign(list(documents.texts), list(documents.tokens))
    return evaluate.evaluate_stages(
        models, submodels, documents, labels_N, eos=Encoder(corpus / "tokenizer").eos, sequence_length=sequence_length,
        device=device)


def publish(
    model: Path, tokenizer: Path, directory: Path, report: Mapping[str, Any], prompts: Sequence[str], sample_tokens: int, seed: int,
) -> dict[str, Any]:
    """Write the Hugging Face directory and let it continue a few prompts.

    Returns:
        The export's figures, and `samples`: [{prompt, text}].
    """
    return export.export(model, tokenizer, directory, report, prompts=prompts, sample_tokens=sample_tokens, seed=seed)
