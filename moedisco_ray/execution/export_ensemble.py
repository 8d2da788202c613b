"""Export the sub-models of a run as an ensemble that is never merged, for transformers (c-BTM, arXiv 2303.14177)."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from moedisco_ray.core.config import LocalInit, RunConfig
from moedisco_ray.core.config.start_files import start_directory
from moedisco_ray.core.errors import ConfigError, RunDirError
from moedisco_ray.core.families import DECLARATIONS
from moedisco_ray.core.limits import ENSEMBLE_BLOCK
from moedisco_ray.core.records.outdated import check_up_to_date
from moedisco_ray.core.records.run_report import current_report, stored_run_config
from moedisco_ray.core.stages import STAGES
from moedisco_ray.core.store.artifacts import OnDisk, reporting_full_disk
from moedisco_ray.core.store.locations import Location
from moedisco_ray.core.store.run_store import RunStore
from moedisco_ray.execution import modeling_ensemble
from moedisco_ray.execution.output_checks import check_new
from moedisco_ray.models import open_checkpoint, read_config, write_config
from moedisco_ray.models.tokenizer_directories import load_pretrained
from moedisco_ray.stages.evaluate.ensemble import TEMPERATURE
from moedisco_ray.stages.export.card import ensemble_card
from moedisco_ray.stages.export.directory import count_parameters, write_configs, write_tokenizer, write_weights
from moedisco_ray.stages.export.front_matter import facts_of
from moedisco_ray.stages.export.origin import Origin
from moedisco_ray.stages.export.stage import datasets_of
from moedisco_ray.stages.text.tokenizer import ENCODING, Encoder

_CODE = Path(modeling_ensemble.__file__)
_COPIED = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
"""Fields of a sub-model's `config.json` that the ensemble has too."""


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
    kind, parameters, size = _check(config, store, location), 0, 0
    store.fetch(tokenizer, clusters)
    start, special = config.model.init, load_pretrained(tokenizer)
    origin = Origin(start_directory(start), not config.tokenizer.replace) if isinstance(start, LocalInit) else None
    target.parent.mkdir(parents=True, exist_ok=True)
    with reporting_full_disk(target), tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as scratch:
        draft = Path(scratch) / "model"
        shutil.copytree(clusters, draft / "router")
        if kind == "tfidf_svd":  # it reads text, not tokens
            shutil.copyfile(tokenizer / ENCODING, draft / "router" / ENCODING)
        for k in range(config.cluster_count):
            source, directory = artifacts["submodels"] / str(k), draft / str(k)
            directory.mkdir()
            with store.using(source):
                trained = open_checkpoint(source)
                write_weights(trained, directory, None)
                write_configs(special, trained["model.norm.weight"].dtype, directory, origin)
                parameters += count_parameters(trained)[0]
            size += sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        submodel = read_config(draft / "0")
        write_config(
            draft,
            {
                "model_type": modeling_ensemble.EnsembleConfig.model_type,
                "architectures": ["EnsembleForCausalLM"],
                "auto_map": {
                    "AutoConfig": f"{_CODE.stem}.EnsembleConfig",
                    "AutoModelForCausalLM": f"{_CODE.stem}.EnsembleForCausalLM",
                },
                "num_submodels": config.cluster_count,
                "router_block": ENSEMBLE_BLOCK,
                "router_temperature": TEMPERATURE,
                "document_start": Encoder(tokenizer).prefix,
                **{field: submodel.get(field) for field in _COPIED},
            },
        )
        write_tokenizer(tokenizer, draft, int(submodel["max_position_embeddings"]) if origin is None else None)
        shutil.copyfile(_CODE, draft / _CODE.name)
        if origin is not None:
            origin.copy_licences(draft)
        card = ensemble_card(report, facts_of(config.model, datasets_of(config)), _CODE.name)
        (draft / "README.md").write_text(card, encoding="utf-8")
        OnDisk().replace(draft, target, {"stage": "export"})
    return {"parameters": parameters, "bytes": size, "submodels": config.cluster_count, "step": None}


def _check(config: RunConfig, store: RunStore, location: Location) -> str:
    """Kind of the document vectors of a run's clusters.

    Raises:
        RunDirError: The run has no trained sub-models, or clusters that the text of a context does not decide.
    """

    def refused(remedy: str) -> RunDirError:
        return RunDirError("RUN_DIR", str(location), remedy)

    if not config.tokens.decoupled:
        raise refused("has no sub-models, since seed_share and finetune_share are 1 together; use `--to hf`")
    if config.owners:
        raise refused("has sub-models of data owners, whose clusters have no centre to route by; use `--to hf`")
    experts = config.model.architecture.num_experts // config.cluster_count
    if experts < DECLARATIONS[config.model.family_name].router.least_in_group:
        raise refused(
            f"has sub-models with {experts} expert, with which transformers cannot run {config.model.family_name}; "
            "use `--to hf`"
        )
    if DECLARATIONS[config.model.family_name].module is not None:
        raise refused(f"has sub-models of {config.model.family_name}, which transformers does not have; use `--to hf`")
    if not store.has(store.directory / "submodels"):
        raise refused("has no trained sub-models yet; resume it with `moedisco run`")
    check_up_to_date("RUN_DIR", location, "submodels")
    kind = str(json.loads(store.read("clusters/cluster_model/vectoriser.json") or b"{}").get("kind"))
    if kind not in modeling_ensemble.VECTORS:
        raise refused(f"has clusters of the kind {kind}, which have no centre to route by; use `--to hf`")
    return kind
