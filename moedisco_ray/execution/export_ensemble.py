"""Export the sub-models of a run as an ensemble that is never merged, for transformers (c-BTM, arXiv 2303.14177)."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.config.apart import without_ensemble
from moedisco_ray.core.errors import ConfigError, RunDirError
from moedisco_ray.core.records.outdated import check_up_to_date
from moedisco_ray.core.records.run_report import current_report, stored_run_config
from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.store.artifacts import OnDisk, reporting_full_disk
from moedisco_ray.core.store.locations import Location
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution.output_checks import check_new
from moedisco_ray.stages.export import modeling_ensemble
from moedisco_ray.stages.export.ensemble import export_submodels
from moedisco_ray.stages.export.stage import datasets_of, has_turns


def export_ensemble(location: Location, target: Path, *, from_checkpoint: bool = False) -> dict[str, Any]:
    """Write the trained sub-models, the clusters' centres, and the code that mixes their predictions.

    The predictions are mixed as in the evaluation.

    Args:
        location: Directory or URI of a run whose sub-models are trained.
        target: Directory to write; it must be new or empty.
        from_checkpoint: Must be false: an ensemble has no fine-tune.

    Returns:
        `parameters` and `bytes` of all sub-models together, `submodels`, their number, and `step`, which is None.

    Raises:
        ConfigError: `from_checkpoint` is true.
        RunDirError: The place holds no run, or a run without trained sub-models or without centres, or the target is
            not empty.
        StorageError: The storage does not respond.
    """
    if from_checkpoint:
        remedy = "an ensemble has the trained sub-models, not the fine-tune; leave it out"
        raise ConfigError("--from-checkpoint", None, remedy)
    check_new(target)
    report, store = current_report(location), RunStore.of(location)
    config = stored_run_config(location)
    artifacts = {stage.name: store.directory / stage.directory for stage in STAGES}
    tokenizer, clusters = artifacts["corpus"] / "tokenizer", artifacts["cluster"] / "cluster_model"
    _check(config, store, location)
    submodels = [artifacts["submodels"] / str(k) for k in range(config.cluster_count)]
    target.parent.mkdir(parents=True, exist_ok=True)
    with (
        reporting_full_disk(target),
        tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as scratch,
        store.using(tokenizer, clusters, *submodels),
    ):
        draft = Path(scratch) / "model"
        figures = export_submodels(
            submodels,
            clusters=clusters,
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
    return {name: figures[name] for name in ("parameters", "bytes", "submodels")} | {"step": None}


def _check(config: RunConfig, store: RunStore, location: Location) -> None:
    """Check that a run has trained sub-models, and clusters that the text of a context decides.

    Raises:
        RunDirError: It has not.
    """
    if (reason := without_ensemble(config)) is not None:
        raise RunDirError("RUN_DIR", str(location), f"{reason}; use `--to hf`")
    if not store.has(store.directory / "submodels"):
        raise RunDirError("RUN_DIR", str(location), "has no trained sub-models yet; resume it with `moedisco run`")
    check_up_to_date("RUN_DIR", location, "submodels")
    kind = str(json.loads(store.read("clusters/cluster_model/vectoriser.json") or b"{}").get("kind"))
    if kind not in modeling_ensemble.VECTORS:
        remedy = f"has clusters of the kind {kind}, which have no centre to route by; use `--to hf`"
        raise RunDirError("RUN_DIR", str(location), remedy)
