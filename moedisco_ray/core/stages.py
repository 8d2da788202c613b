"""The pipeline's stages: their order, what each needs, and which settings its result depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from moedisco_ray.core.config import RunConfig


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of the pipeline and one artifact of the run directory.

    Attributes:
        name: Its name in events, reports and on the command line.
        directory: Where its artifact lies in the run directory.
        needs: The stages whose artifacts it reads.
        settings: Dotted configuration paths that its result depends on. Pools, checkpoints, trackers and looks at the held-out
            loss change when and where work happens, never what comes out, so no stage names them. Nor a quorum, which says when a
            run may do with less: it can be lowered while a run waits for machines that do not come, and what is trained stays. What
            each sub-model contributed is in the stage's summary.
    """

    name: str
    directory: str
    needs: tuple[str, ...]
    settings: tuple[str, ...]


STAGES: tuple[Stage, ...] = (
    Stage("corpus", "corpus", (), ("seed", "corpus", "tokenizer")),
    Stage("seed", "seed", ("corpus",), ("model", "tokens.total", "tokens.seed_share", "submodels.optimizer", "clusters.count")),
    Stage("cluster", "clusters", ("corpus", "seed"), ("clusters", "tokens")),
    Stage("decompose", "decomposed", ("seed", "cluster"), ()),
    Stage("submodels", "submodels", ("decompose", "cluster"), (
        "tokens", "submodels.optimizer", "submodels.sync_every", "submodels.outer", "submodels.backbone_lr_scale",
        "submodels.backbone_lr_scale_from", "submodels.keep_moments")),
    Stage("merge", "merged", ("decompose", "cluster", "submodels"), ("merge", "finetune.keep_moments")),
    Stage("finetune", "finetuned", ("merge",), (
        "finetune.optimizer", "finetune.phases", "finetune.dense_gate", "finetune.spike_guard", "finetune.early_stop",
        "finetune.load_balance", "finetune.z_loss")),
    Stage("evaluate", "evaluation", ("finetune",), (
        "evaluation.max_tokens", "evaluation.stages", "evaluation.ensemble", "evaluation.ensemble_top_k", "evaluation.sources",
        "evaluation.lm_eval", "evaluation.lm_eval_limit")),
    Stage("export", "model", ("finetune", "evaluate"), ("evaluation.prompts", "evaluation.sample_tokens", "export")),
)


def fingerprints(config: RunConfig, inputs: Mapping[str, str] | None = None) -> dict[str, str]:
    """A digest per stage of everything its result depends on: its settings, its upstream stages, and the input files.

    Args:
        config: The run's configuration.
        inputs: Identity of the user's files, by the stage that reads them.
    """
    values = config.model_dump(mode="json")
    digests: dict[str, str] = {}
    for stage in STAGES:
        material = {
            "stage": stage.name,
            "settings": {path: _at(values, path) for path in stage.settings},
            "needs": {name: digests[name] for name in stage.needs},
            "inputs": (inputs or {}).get(stage.name, ""),
        }
        digests[stage.name] = hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()
    return digests


def changed_settings(old: dict[str, Any], config: RunConfig) -> list[str]:
    """Dotted paths of result-relevant settings that differ between a stored configuration and this one."""
    new = config.model_dump(mode="json")
    paths = dict.fromkeys(path for stage in STAGES for path in stage.settings)
    return [leaf for path in paths for leaf in _differences(_at(old, path), _at(new, path), path)]


def _differences(old: Any, new: Any, path: str) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return [leaf for key in keys for leaf in _differences(old.get(key), new.get(key), f"{path}.{key}")]
    return [] if old == new else [path]


def _at(values: Any, path: str) -> Any:
    for part in path.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
