"""What the pipeline sends to a worker: plain values in, a directory or figures out. Each opens what it needs and nothing more."""

from __future__ import annotations

import dataclasses
import importlib
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from moedisco_ray.core.config import CheckpointInit, Evaluation, LocalInit, Merge, Model, UpcycleInit
from moedisco_ray.models import (
    ModelMap,
    canonical_shapes,
    config_values,
    group_size,
    hf_config,
    load_model,
    open_checkpoint,
    open_dense,
    random_source,
    read_config,
    save_model,
    specialise,
    submodel_config,
    upcycled_config,
    write_checkpoint,
)
from moedisco_ray.models.optimizer_state import FOLDER, open_moments, write_moments
from moedisco_ray.stages import decompose, evaluate, export, merge
from moedisco_ray.stages.clustering import ClusterModel
from moedisco_ray.stages.corpus import Encoder, Limits, read_unseen
from moedisco_ray.stages.corpus.pretrained import open_encoder
from moedisco_ray.stages.merge import Batch


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
        # transformers would leave the padding token's embedding out of training; the export has it again.
        return open_checkpoint(model.init.checkpoint), {**read_config(model.init.checkpoint), "pad_token_id": None}
    if isinstance(model.init, UpcycleInit):
        config = upcycled_config(model.init.upcycle, model.family, model.init.num_experts, model.init.num_experts_per_tok)
        dense = open_dense(model.init.upcycle, model.family)
        return decompose.with_seed(dense, random_source(config, seed), ModelMap(model.family)), config
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
    tokens: Sequence[int], batches: Sequence[Batch], held_out: Sequence[NDArray[np.int32]], settings: Merge, keep_moments: bool,
    device: str, directory: Path,
) -> dict[str, Any]:
    """Write the merged MoE with its calibrated router.

    Args:
        model: The run's model section.
        tokenizer: The corpus' tokeniser.
        sequence_length: Of training.
        seed: Of random router rows, and of what DARE drops.
        submodels: The trained sub-models, in the clusters' order.
        start: The backbone that all of them began with, or took in at their last meeting.
        tokens: What each was trained on.
        batches: Calibration data.
        held_out: Windows of text [L] on which recipes for the backbone are compared.
        settings: The run's merge section.
        keep_moments: Whether the sub-models' moments are merged too.
        device: Where the merged model runs.
        directory: Where to.

    Returns:
        Figures per layer; `merge.json` beside the model also says what became of each tensor.
    """
    _, config = initial_moe(model, tokenizer, sequence_length, seed)
    prefix = Encoder(tokenizer).prefix

    def loss(merged: PreTrainedModel) -> float:
        nats_N = evaluate.document_nats(merged, held_out, prefix=prefix, sequence_length=sequence_length)
        return float(nats_N.sum()) / sum(map(len, held_out))

    router = merge.RouterSettings(settings.router, settings.match_load, settings.match_scale, seed)
    result = merge.build_merged(
        submodels, start, config, merge.recipes(settings, tokens, seed), batches, directory, router=router, loss=loss,
        device=device)
    if keep_moments:
        merge.merge_moments(submodels, config, merge.merge_weights("token_weighted", tokens), directory)
    return {**result, "tensors": len(result["tensors"])}


def write_whole(
    model: Model, tokenizer: Path, sequence_length: int, seed: int, clusters: int, trained_seed: Path | None,
    batches: Sequence[Batch], settings: Merge, keep_moments: bool, device: str, directory: Path,
) -> dict[str, Any]:
    """Write the MoE that is trained without sub-models: the initial one, or the upcycled seed.

    Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055) copies the seed's experts to all places and begins with a fresh router.
    A lone expert was trained at a weight of 1: where top-k weights are not normalised, `merge.match_scale` keeps the layers' output
    scale as it does after a merge.

    Args:
        model: The run's model section.
        tokenizer: The corpus' tokeniser.
        sequence_length: Of training.
        seed: Of random tensors.
        clusters: Into how many groups the seed was cut from the MoE.
        trained_seed: The seed model; None: none was trained.
        batches: Text that the output scale is measured on, all of cluster 0.
        settings: The run's merge section.
        keep_moments: Whether the seed's moments are upcycled too.
        device: Where the MoE runs.
        directory: Where to.

    Returns:
        `layers`: figures per router, where there is a seed.
    """
    source, config = initial_moe(model, tokenizer, sequence_length, seed)
    if trained_seed is None:
        write_checkpoint(directory, source.items(), config)
        return {"layers": []}
    joined = directory / ".joined"
    names = ModelMap(model.family)

    upcycled = decompose.with_seed(open_checkpoint(trained_seed), source, names, fresh_router=True)
    write_checkpoint(joined, upcycled.items(), config)
    whole = specialise(load_model(joined).to(device))
    layers = merge.calibrate(whole, clusters, batches, merge.RouterSettings("concat", match_scale=settings.match_scale, seed=seed))
    save_model(whole.cpu(), directory)
    shutil.rmtree(joined)
    moments = open_moments(trained_seed / FOLDER) if keep_moments else None
    if moments is not None:
        zeros = {key: torch.zeros(()).expand(shape) for key, shape in canonical_shapes(config).items()}
        found = moments.tensors
        write_moments(
            directory / FOLDER, lambda kind: decompose.with_seed(found[kind], zeros, names, fresh_router=True).items(),
            moments.steps, config)
    return {"layers": layers}


def measure(
    models: Mapping[str, Path], submodels: Sequence[Path], corpus: Path, cluster_model: Path | None, limits: Limits,
    settings: Evaluation, device: str,
) -> dict[str, Any]:
    """Perplexity and bits per byte of every model of the run; of the finished one also routers, unseen text and tasks.

    Args:
        models: The model that each stage made; all but the finished one are passed over unless the settings ask for them.
        submodels: The trained sub-models; each is measured on its own cluster, under the same condition.
        corpus: The corpus artifact.
        cluster_model: Tells which cluster a validation document belongs to; None: there are no clusters.
        limits: How long the corpus' documents and the training's sequences are.
        settings: The run's evaluation section.
        device: Where.

    Returns:
        The figures, and `extra_seconds`: time that only a run with other models than the finished one needs.
    """
    documents, sequence_length = evaluate.load_documents(validation_parts(corpus), settings.max_tokens), limits.sequence_tokens
    encoder = Encoder(corpus / "tokenizer")
    began = time.monotonic()
    clusters = None if cluster_model is None else ClusterModel.load(cluster_model)
    labels_N = None if clusters is None else clusters.assign(list(documents.texts), list(documents.tokens))
    labelling = time.monotonic() - began
    shown = (models, submodels) if settings.stages else ({"finetune": models["finetune"]}, ())
    result = evaluate.evaluate_stages(
        *shown, documents, labels_N, prefix=encoder.prefix, sequence_length=sequence_length, device=device)
    result["extra_seconds"] += labelling
    began = time.monotonic()
    if settings.ensemble and clusters is not None:
        known = clusters    # narrowed for the closure

        def distances(contexts: Sequence[NDArray[np.int32]]) -> NDArray[np.float64]:
            return known.costs(encoder.decode(contexts), contexts)

        result["ensemble"] = evaluate.evaluate_ensemble(
            submodels, documents, distances, settings.ensemble_top_k, prefix=encoder.prefix, sequence_length=sequence_length,
            device=device)
    result["extra_seconds"] += time.monotonic() - began
    trained_on = sorted((corpus / "train").glob("*.parquet"))
    return result | judge(models["finetune"], corpus / "tokenizer", settings, limits, device, trained_on)


def judge(
    model: Path, tokenizer: Path, settings: Evaluation, limits: Limits | None, device: str, trained_on: Sequence[Path] = (),
) -> dict[str, Any]:
    """What a model makes of text that it was never trained on, and of tasks; nothing of what is not asked for.

    Args:
        model: A Hugging Face directory.
        tokenizer: The directory of its tokeniser.
        settings: Names the sources and task files.
        limits: How long sequences and documents are; None: as many tokens as the model has positions, and 8 times as many.
        device: Where.
        trained_on: Files of the training documents.

    Returns:
        `unseen`: `evaluate_unseen`'s figures, `trained_on`, how many documents were left out since the corpus has them, and
        `skipped`, the files that could not be read;
        `lm_eval`: `evaluate_tasks`' figures.

    Raises:
        CheckpointError: The model cannot be read.
        ConfigError: A task file holds no tasks.
        CorpusError: A source cannot be read, or holds nothing that was not trained on.
    """
    encoder = open_encoder(tokenizer)
    limits = limits or Limits(positions := int(read_config(model)["max_position_embeddings"]), 8 * positions)
    length = limits.sequence_tokens
    result: dict[str, Any] = {}
    if settings.sources:
        found = read_unseen(settings.sources, encoder, settings.max_tokens, limits, trained_on)
        documents = evaluate.Documents(*map(tuple, zip(*found.samples, strict=True)))
        unseen = evaluate.evaluate_unseen(model, documents, prefix=encoder.prefix, sequence_length=length, device=device)
        skipped = [dataclasses.asdict(each) for each in found.skipped]
        result["unseen"] = {**unseen, "trained_on": found.trained_on, "skipped": skipped}
    if settings.lm_eval:
        # Optional, and seconds to import.
        harness = importlib.import_module("moedisco_ray.stages.evaluate.harness")
        result["lm_eval"] = harness.evaluate_tasks(
            model, settings.lm_eval, encoder.encode, prefix=encoder.prefix, sequence_length=length, limit=settings.lm_eval_limit,
            device=device)
    return result


def held_out(corpus: Path, every: int, max_tokens: int, sequence_length: int) -> evaluate.ValidationSlice:
    """What a training's looks at its held-out loss take from the corpus artifact."""
    return evaluate.ValidationSlice(
        every, validation_parts(corpus), max_tokens, Encoder(corpus / "tokenizer").prefix, sequence_length)


def validation_parts(corpus: Path) -> tuple[Path, ...]:
    """Files of a corpus artifact's validation documents, in order."""
    return tuple(sorted((corpus / "validation").glob("*.parquet")))


def publish(
    model: Path, tokenizer: Path, directory: Path, report: Mapping[str, Any], prompts: Sequence[str], sample_tokens: int, seed: int,
    start: Model, own_tokens: bool, dtype: Literal["auto", "fp32", "bf16", "fp16"],
) -> dict[str, Any]:
    """Write the Hugging Face directory and let it continue a few prompts.

    Args:
        model: The trained model.
        tokenizer: The corpus' tokenizer.
        directory: Where to.
        report: The run's report, for the model card.
        prompts: Beginnings to continue.
        sample_tokens: Tokens to add to each.
        seed: Of the run.
        start: The run's model section, which names what the run started from.
        own_tokens: Whether the run kept the tokenizer of that.
        dtype: Of the weights; see `export.export`.

    Returns:
        The export's figures, and `samples`: [{prompt, text}].
    """
    origin = export.Origin(start.init.directory, own_tokens) if isinstance(start.init, LocalInit) else None
    return export.export(
        model, tokenizer, directory, report, prompts=prompts, sample_tokens=sample_tokens, seed=seed,
        prefix=Encoder(tokenizer).prefix, origin=origin, dtype=dtype)
