"""The evaluate stage: measure all models on validation text, and the finished one also on other text and tasks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from moedisco_ray.core.config import Evaluation
from moedisco_ray.core.config.apart import ApartChoice, apart_choice
from moedisco_ray.core.limits import BATCH_TOKENS, SMALLER
from moedisco_ray.core.records.apart import of_result
from moedisco_ray.core.records.events import Emit, StageProgress, discard
from moedisco_ray.core.records.summaries import (
    ClusterFigures,
    CorpusSummary,
    Departure,
    EvaluateSummary,
    EvaluationRecord,
)
from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.store.artifacts import Draft, write_json
from moedisco_ray.core.store.run_work import Files
from moedisco_ray.models.streamed import open_streamed
from moedisco_ray.stages.context import Context, device_of
from moedisco_ray.stages.evaluate.apart import keep_apart
from moedisco_ray.stages.evaluate.measure import (
    evaluate_ensemble,
    evaluate_stages,
    evaluate_start,
    evaluate_unseen,
    open_start,
    xz_bits_per_byte,
)
from moedisco_ray.stages.evaluate.owned import evaluate_owned
from moedisco_ray.stages.scoring import default_dtype
from moedisco_ray.stages.start import Start
from moedisco_ray.stages.text.cutting import Limits
from moedisco_ray.stages.text.pretrained import open_encoder
from moedisco_ray.stages.text.tokenizer import Encoder
from moedisco_ray.stages.text.unseen import Unseen
from moedisco_ray.stages.text.validation import Documents, load_documents, validation_parts

Tokens = Sequence[NDArray[np.int32]]


class Clusters(Protocol):
    """A saved cluster model, which assigns documents to the run's clusters."""

    def assign(self, texts: Sequence[str], tokens: Tokens) -> NDArray[np.int64]:
        """The cluster of each of N documents, [N]."""

    def costs(self, texts: Sequence[str], tokens: Tokens) -> NDArray[np.float64]:
        """Cost of assigning each of N documents to each of C clusters, [N, C]."""


@dataclasses.dataclass(frozen=True)
class Readers:
    """Functions of other stages that the evaluation needs; the pipeline passes them in.

    Attributes:
        clusters: Opens a saved cluster model, which computes vectors on the given device.
        unseen: Samples text that was not trained on.
    """

    clusters: Callable[[Path, str], Clusters]
    unseen: Callable[..., Unseen]


def run(context: Context, draft: Draft, *, readers: Readers) -> None:
    """Measure every model of the run, and the model that it started from, on the validation text."""
    config, pool, models = context.config, context.config.finetune_pool, _models(context)
    found = context.call_with_events(
        pool,
        Files(files_read(context)),
        evaluate,
        models,
        submodels=context.submodels,
        corpus=context.of("corpus"),
        cluster_model=_cluster_model(context),
        limits=Limits(config.corpus.sequence_length, config.corpus.document_tokens),
        settings=_with_absolute_paths(config.evaluation),
        apart=apart_choice(config),
        start=context.start if config.measures_start else None,
        device=device_of(pool),
        readers=readers,
        smaller={"batch_tokens": BATCH_TOKENS // SMALLER, "resident": False},
    )
    owners = _on_owned_text(context, models)
    measured = EvaluationRecord.model_validate({**found, "owners": owners} if owners else found)
    write_json(draft.path / "evaluation.json", measured.to_json())
    result = of_result(measured)
    summary = EvaluateSummary(
        perplexity=result.perplexity,
        bits_per_byte=result.bits_per_byte,
        documents=measured.documents,
        tokens=measured.tokens,
        left=[
            Departure(owner=name, what="losses on held-out text", bytes=len(json.dumps(each)))
            for name, each in owners.items()
        ],
    )
    draft.summary.update(summary.to_json())


def files_read(context: Context) -> list[Path]:
    """Files and directories of earlier stages that the evaluation reads."""
    corpus = context.of("corpus")
    return [
        *_models(context).values(),
        *context.submodels,
        corpus / "validation",
        corpus / "tokenizer",
        *filter(None, [_cluster_model(context)]),
        *([corpus / "train"] if context.config.evaluation.sources else []),
    ]


def _models(context: Context) -> dict[str, Path]:
    """The model that each stage made, by the stage."""
    return {stage.name: context.of(stage.name) for stage in STAGES if stage.makes_model(context.config)}


def _cluster_model(context: Context) -> Path | None:
    return context.of("cluster") / "cluster_model" if context.config.tokens.decoupled else None


def _on_owned_text(context: Context, models: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """The fields of `OwnerFigures` of each data owner who holds text out, computed on the owner's nodes."""
    config, tokenizer = context.config, context.of("corpus") / "tokenizer"
    held_out = {
        name: text.validation_documents for name, text in context.summary("corpus", CorpusSummary).owners.items()
    }
    found = {}
    for owner in context.owners:
        if not held_out[owner.name]:
            continue
        shown = dict(models) if config.evaluation.stages else {"finetune": models["finetune"]}
        if config.evaluation.stages:
            shown["submodels"] = context.submodels[owner.cluster]
        found[owner.name] = context.call(
            owner.pool,
            Files([*shown.values(), tokenizer]),
            evaluate_owned,
            shown,
            owner_store=owner.store,
            tokenizer=tokenizer,
            max_tokens=config.evaluation.max_tokens,
            sequence_length=Limits(config.corpus.sequence_length, config.corpus.document_tokens).sequence_tokens,
            device=device_of(owner.pool),
        )
    return found


def evaluate(
    models: Mapping[str, Path],
    *,
    submodels: Sequence[Path],
    corpus: Path,
    cluster_model: Path | None,
    limits: Limits,
    settings: Evaluation,
    apart: ApartChoice,
    start: Start | None,
    device: str,
    readers: Readers,
    batch_tokens: int = BATCH_TOKENS,
    resident: bool | None = None,
    events: Emit = discard,
) -> dict[str, Any]:
    """Measure every model by perplexity and bits per byte, and the finished one also on unseen text and tasks.

    Args:
        models: The model that each stage made; all but the finished one are skipped unless the settings ask for them.
        submodels: The trained sub-models; each is measured on its own cluster, if the settings ask for it.
        corpus: The corpus artifact.
        cluster_model: The saved clusters; None without clusters.
        limits: Length of a training sequence, and maximum length of a document in the corpus.
        settings: The run's evaluation section.
        apart: Whether the sub-models are also measured as an ensemble, and what decides whether they stay apart.
        start: The trained model that the run started from; None if it is not to be measured.
        device: Device that the models run on.
        readers: Functions of other stages; see `Readers`.
        batch_tokens: Maximum positions of a forward pass.
        resident: Whether weights stay loaded; None if they do where the model is small.
        events: Takes `stage_progress` events.

    Returns:
        The fields of `EvaluationRecord`.
    """
    documents, sequence_length = load_documents(validation_parts(corpus), settings.max_tokens), limits.sequence_tokens
    encoder = Encoder(corpus / "tokenizer")
    # The cluster model may hold a large one, so that it is opened anew when it is needed again.
    labels_N = (
        None
        if cluster_model is None
        else readers.clusters(cluster_model, device).assign(list(documents.texts), list(documents.tokens))
    )
    shown = (models, submodels) if settings.stages else ({"finetune": models["finetune"]}, ())
    ensemble = apart != "never" and cluster_model is not None
    passes = len(shown[0]) + (len(submodels) > 0 and settings.stages) + len(submodels) * ensemble + (start is not None)
    progress = StageProgress(events, "evaluate", "tokens evaluated", passes * sum(map(len, documents.tokens)))
    result = evaluate_stages(
        *shown,
        documents,
        labels_N,
        prefix=encoder.prefix,
        sequence_length=sequence_length,
        device=device,
        batch_tokens=batch_tokens,
        resident=resident,
        advance=progress.add,
    )
    result |= {"xz_bits_per_byte": xz_bits_per_byte(documents), "digest": documents.digest()}
    if start is not None:
        result["start"] = evaluate_start(
            start,
            documents,
            labels_N,
            prefix=encoder.prefix,
            sequence_length=sequence_length,
            device=device,
            batch_tokens=batch_tokens,
            resident=resident,
            advance=progress.add,
        )
    if apart != "never" and cluster_model is not None:
        known = cluster_model  # a name that mypy knows is not None in the function below

        def distances(contexts: Tokens) -> NDArray[np.float64]:
            return readers.clusters(known, device).costs(encoder.decode(contexts), contexts)

        result["ensemble"] = evaluate_ensemble(
            submodels,
            documents,
            labels_N,
            distances,
            prefix=encoder.prefix,
            sequence_length=sequence_length,
            device=device,
            batch_tokens=batch_tokens,
            resident=resident,
            advance=progress.add,
        )
        result["apart"] = keep_apart(
            [ClusterFigures.model_validate(each) for each in result["clusters"]],
            [ClusterFigures.model_validate(each) for each in result["ensemble"]["clusters"]],
            count=len(submodels),
            asked=apart == "always",
        ).to_json()
    if not settings.sources and not settings.lm_eval:
        return result
    judged = judge(
        open_streamed(models["finetune"], dtype=default_dtype(device), device=device, resident=resident),
        corpus / "tokenizer",
        settings,
        limits=limits,
        read_unseen=readers.unseen,
        trained_on=sorted((corpus / "train").glob("*.parquet")),
        start=None if start is None else open_start(start, device),
    )
    return result | judged


def judge(
    model: PreTrainedModel,
    tokenizer: Path,
    settings: Evaluation,
    *,
    read_unseen: Callable[..., Unseen],
    limits: Limits | None = None,
    trained_on: Sequence[Path] = (),
    start: PreTrainedModel | None = None,
    most_examples: int | None = None,
) -> dict[str, Any]:
    """Measure a model on the unseen text and the task files that the settings name, if any.

    Args:
        model: The model, on its device.
        tokenizer: The directory of its tokenizer.
        settings: Names the sources and task files.
        read_unseen: Samples the sources' text.
        limits: Limits on the length of sequences and documents. By default a sequence has at most as many tokens as the
            model has positions, and a document 8 times as many.
        trained_on: Files of the training documents.
        start: The model that the run started from, to measure it on the unseen text too.
        most_examples: Maximum number of examples per task file, taken from its start; None: all.

    Returns:
        `unseen`, if the settings name sources: the figures of `evaluate_unseen`; `trained_on`, the number of documents
        left out because the corpus has them; `skipped`, the files that were not read; and `start`, the figures of the
        start model, if there is one. `lm_eval`, if the settings name task files: the figures of `evaluate_tasks`.

    Raises:
        ConfigError: A task file holds no tasks.
        CorpusError: A source cannot be read, or all its documents were trained on.
    """
    encoder = open_encoder(tokenizer)
    limits = limits or Limits(positions := int(model.config.max_position_embeddings), 8 * positions)
    length = limits.sequence_tokens
    result: dict[str, Any] = {}
    if settings.sources:
        found = read_unseen(settings.sources, encoder, settings.max_tokens, limits, trained_on, tokenizer=tokenizer)
        documents = Documents(*map(tuple, zip(*found.samples, strict=True)))
        unseen = evaluate_unseen(model, documents, prefix=encoder.prefix, sequence_length=length)
        skipped = [dataclasses.asdict(each) for each in found.skipped]
        result["unseen"] = {**unseen, "trained_on": found.trained_on, "skipped": skipped}
        if start is not None:
            result["unseen"]["start"] = evaluate_unseen(start, documents, prefix=encoder.prefix, sequence_length=length)
    if settings.lm_eval:
        from moedisco_ray.stages.evaluate.harness import evaluate_tasks  # noqa: PLC0415 - optional, slow to import

        result["lm_eval"] = evaluate_tasks(
            model, settings.lm_eval, encoder.encode, prefix=encoder.prefix, sequence_length=length, limit=most_examples
        )
    return result


def _with_absolute_paths(evaluation: Evaluation) -> Evaluation:
    """The settings with absolute paths, for a worker that runs in another directory."""
    sources = tuple(
        source
        if "://" in source.path or source.path == "embedded"
        else source.model_copy(update={"path": str(Path(source.path).absolute())})
        for source in evaluation.sources
    )
    return evaluation.model_copy(
        update={"sources": sources, "lm_eval": tuple(path.absolute() for path in evaluation.lm_eval)}
    )
