"""Export the model of a run that is not finished."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import RunDirError
from moedisco_ray.core.records.events import discard
from moedisco_ray.core.records.outdated import check_up_to_date
from moedisco_ray.core.records.run_report import current_report, stored_run_config
from moedisco_ray.core.stages import stage_named
from moedisco_ray.core.store.artifacts import OnDisk, parse_manifest, reporting_full_disk
from moedisco_ray.core.store.locations import Location
from moedisco_ray.core.store.manifests import MANIFEST
from moedisco_ray.core.store.run_store import SHARED, RunStore
from moedisco_ray.execution.checkpoint_folder import own_storage
from moedisco_ray.execution.local_backend import LocalBackend
from moedisco_ray.execution.output_checks import check_new
from moedisco_ray.models import read_config
from moedisco_ray.stages.context import Context
from moedisco_ray.stages.export.stage import datasets_of, export_model, has_turns
from moedisco_ray.stages.train.finetune import job_of
from moedisco_ray.stages.train.jobs import checkpoint_location, training_home
from moedisco_ray.training import write_partial_result
from moedisco_ray.training.checkpoints.model import newest_step, write_model_of
from moedisco_ray.training.checkpoints.storage import Storage


def export_run(location: Location, target: Path, *, from_checkpoint: bool) -> dict[str, Any]:
    """Write the model of a run as the export stage does, without samples.

    Args:
        location: Directory or URI of the run.
        target: Directory to write; it must be new or empty.
        from_checkpoint: Whether to export the newest checkpoint of the fine-tune, instead of the finished fine-tune.

    Returns:
        `parameters`, `active_parameters`, `rounded_to` and `bytes`, as the export stage, and `step` of the checkpoint
        or None.

    Raises:
        RunDirError: The place holds no run, the model does not exist yet or is out of date, or the target is not
            empty.
        StorageError: The storage does not respond, or the checkpoint is damaged.
    """
    check_new(target)
    report = current_report(location)
    store = RunStore.of(location)
    config = stored_run_config(location)
    context = context_of(config, store)
    needed = context.of("merge" if from_checkpoint else "finetune")
    if not store.has(needed):
        remedy = "has no merged MoE yet" if from_checkpoint else "has no finished fine-tune; pass --from-checkpoint"
        raise RunDirError("RUN_DIR", str(location), remedy)
    check_up_to_date("RUN_DIR", location, "merge" if from_checkpoint else "finetune")
    tokenizer = context.of("corpus") / "tokenizer"
    target.parent.mkdir(parents=True, exist_ok=True)
    with reporting_full_disk(target), tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as scratch:
        draft = Path(scratch) / "model"
        if from_checkpoint:
            step: int | None = _write_checkpoint_model(context, Path(scratch) / "trained")
            model = Path(scratch) / "trained"
            store.fetch(tokenizer)
        else:
            step, model = None, needed
            store.fetch(model, tokenizer)
        figures = export_model(
            model,
            tokenizer=tokenizer,
            directory=draft,
            report=report,
            prompts=(),
            seed=config.seed,
            start=config.model,
            own_tokens=not config.tokenizer.replace,
            dtype=config.export.dtype,
            device="cpu",
            datasets=datasets_of(config),
            has_turns=has_turns(config),
        )
        OnDisk().replace(draft, target, {"stage": "export"})
    return {name: value for name, value in figures.items() if name != "samples"} | {"step": step}


def context_of(config: RunConfig, store: RunStore) -> Context:
    # The text of the run may have changed or be gone, so the fingerprint follows from that of the merged MoE.
    folder = stage_named("merge").directory
    merged = parse_manifest(store.read(f"{folder}/{MANIFEST}"), folder, str(store.location))
    fingerprint = stage_named("finetune").fingerprint(config, {"merge": merged.fingerprint if merged else ""})
    return Context(
        config=config,
        directory=store.directory,
        fingerprint=fingerprint,
        emit=discard,
        backend=LocalBackend(),
        own_storage=own_storage(config, store),
    )


def _write_checkpoint_model(context: Context, directory: Path) -> int:
    key_file = training_home(context, "finetune", "finetune") / "checkpoints.key"
    context.store.fetch(key_file, context.of("merge") / "config.json")
    storage = Storage(checkpoint_location(context, "finetune", "finetune"), key_file)
    if not context.config.finetune.lora.rank:
        return write_model_of(storage, read_config(context.of("merge")), directory)
    step = newest_step(storage)
    context.store.fetch(context.of("merge"))
    shutil.copyfile(key_file, directory.parent / key_file.name)  # a job's key is next to its output
    # The checkpoint holds the adapters alone.
    write_partial_result(dataclasses.replace(job_of(context), output=directory, store=SHARED))
    return step
