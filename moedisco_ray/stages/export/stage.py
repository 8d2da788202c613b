"""The export stage: write the Hugging Face directory, with a model card and samples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moedisco_ray.core.config import LocalInit, Model, RunConfig
from moedisco_ray.core.config.start_files import start_directory
from moedisco_ray.core.records.apart import keeps_apart
from moedisco_ray.core.records.events import Emit, StageProgress, discard
from moedisco_ray.core.records.export_summary import ExportSummary
from moedisco_ray.core.records.report import report_of
from moedisco_ray.core.records.run_record import RunReport
from moedisco_ray.core.store.artifacts import Draft
from moedisco_ray.core.store.hub import dataset_name
from moedisco_ray.core.store.run_work import Files
from moedisco_ray.stages.context import Context, device_of
from moedisco_ray.stages.export.directory import ExportDtype, export
from moedisco_ray.stages.export.ensemble import export_submodels
from moedisco_ray.stages.export.front_matter import facts_of
from moedisco_ray.stages.export.origin import Origin
from moedisco_ray.stages.text.given_tokens import GivenTokens
from moedisco_ray.stages.text.tokenizer import Encoder


def run(context: Context, draft: Draft) -> None:
    """Write the directory of the run's model: the finished MoE, or the sub-models if the evaluation says so."""
    config, tokenizer = context.config, context.of("corpus") / "tokenizer"
    report = report_of(context.store.read_newest, config)
    finished, clusters = context.of("finetune"), context.of("cluster") / "cluster_model"
    if keeps_apart(report.evaluation):
        read = [*context.submodels, clusters]
        write: Callable[..., dict[str, Any]] = functools.partial(
            export_submodels, list(context.submodels), clusters=clusters
        )
    else:
        read, write = [finished], functools.partial(export_model, finished)
    figures = context.call_with_events(
        config.finetune_pool,
        Files([*read, tokenizer], [draft.path]),
        write,
        tokenizer=tokenizer,
        directory=draft.path,
        report=report,
        prompts=config.evaluation.prompts,
        seed=config.seed,
        start=config.model,
        own_tokens=not config.tokenizer.replace,
        dtype=config.export.dtype,
        device=device_of(config.finetune_pool),
        datasets=datasets_of(config),
        has_turns=has_turns(config),
    )
    draft.summary.update(ExportSummary.model_validate(figures).to_json())


def datasets_of(config: RunConfig) -> list[str]:
    """Names of the data sets of the Hugging Face hub that a run trains on."""
    return list(dict.fromkeys(filter(None, (dataset_name(source.path) for source in config.corpus.sources))))


def has_turns(config: RunConfig) -> bool:
    """Whether a run trains on conversations, or on prompts with completions."""
    return any(
        source.messages_column or source.instruction_column or source.completion_column
        for source in config.corpus.sources
    )


def export_model(
    model: Path,
    *,
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
    """Write the Hugging Face directory and let the model continue a few prompts.

    Args:
        model: The trained model.
        tokenizer: The corpus' tokenizer.
        directory: Directory of the exported model.
        report: The run's report, for the model card.
        prompts: Texts to continue.
        seed: Seed of the run.
        start: The run's model section, which names what the run started from.
        own_tokens: Whether the run kept the tokenizer of the model that it started from.
        dtype: Dtype of the weights; see `export`.
        device: Device that the samples are computed on.
        datasets: Data sets of the Hugging Face hub that the run trained on, for the model card.
        has_turns: Whether the run trains on conversations, or on prompts with completions.
        events: Takes `stage_progress` events.

    Returns:
        The export's figures, and `samples`: [{prompt, text}].
    """
    origin = Origin(start_directory(start.init), own_tokens) if isinstance(start.init, LocalInit) else None
    return export(
        model,
        tokenizer,
        directory,
        report,
        prompts=prompts,
        seed=seed,
        prefix=Encoder(tokenizer).prefix,
        origin=origin,
        facts=facts_of(start, list(datasets)),
        dtype=dtype,
        device=device,
        turn_end=GivenTokens(tokenizer).turn_end() if has_turns else None,
        advance=StageProgress(events, "export", "files written").add,
    )
