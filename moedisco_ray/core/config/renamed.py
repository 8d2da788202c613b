"""Converts configurations that earlier versions stored into the form of this version.

Only configurations that a run directory or a service has stored are converted. In a configuration that a user writes, a
setting's old name is an error.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from moedisco_ray.core.config.run import RunConfig
from moedisco_ray.core.errors import DamagedError
from moedisco_ray.core.store.checksums import checked
from moedisco_ray.core.store.locations import Location

REMOVED = frozenset(
    {
        "clusters.text",
        "clusters.iterations",
        "clusters.method",
        "clusters.dimensions",
        "clusters.restarts",
        "clusters.sample",
        *(
            f"{section}.optimizer.{name}"
            for section in ("submodels", "finetune")
            for name in ("decay", "betas", "clip")
        ),
        "submodels.optimizer.state",
        "finetune.optimizer.state",
        "submodels.backbone_lr_scale",
        "submodels.backbone_lr_scale_from",
        "submodels.patience",
        "submodels.round_patience",
        "submodels.late_weight",
        "merge.delta_scale",
        "merge.ties_keep",
        "merge.dare_drop",
        "merge.auto_scales",
        "merge.match_load",
        "merge.match_scale",
        "merge.auto_tokens",
        "finetune.phases",
        "finetune.dense_gate",
        "finetune.spike_guard",
        "finetune.early_stop",
        "finetune.max_failures",
        "finetune.exchange",
        "checkpoint.keep",
        "evaluation.ensemble",
        "evaluation.slice_tokens",
        "evaluation.lm_eval_limit",
        "evaluation.sample_tokens",
        "tracking.log_model",
    }
)
CONSTANTS: Mapping[str, Any] = {
    "clusters.text": "needed",
    "clusters.iterations": 50,
    "clusters.method": "kmeans",
    "clusters.dimensions": 64,
    "clusters.restarts": 4,
    "clusters.sample": 10_000,
    **{
        f"{section}.optimizer.{name}": value
        for section in ("submodels", "finetune")
        for name, value in (("decay", 0.2), ("betas", [0.9, 0.95]), ("clip", 1.0))
    },
    "submodels.backbone_lr_scale": 1.0,
    "submodels.late_weight": None,
    "merge.delta_scale": 1.0,
    "merge.match_load": True,
    "merge.match_scale": True,
    "finetune.phases": [{"train": "all", "share": 1.0}],
    "finetune.dense_gate": 0.0,
    "finetune.spike_guard": None,
    "finetune.early_stop": None,
    "finetune.exchange": "auto",
    "evaluation.ensemble": False,
    "evaluation.lm_eval_limit": None,
    "evaluation.sample_tokens": 48,
}
"""Removed settings that changed results, each with the value that every run has now, as JSON. A stored configuration
with another value opens, but its run cannot be continued or repeated as it was."""
_MATCHES = ("merge.match_load", "merge.match_scale")
"""Settings that are true now where routers come from data, and false where they are random."""
REMOVED_UNLESS_USED: Mapping[str, Any] = {
    "clusters.overlap": 0.0,
    "evaluation.ensemble_top_k": None,
    "tracking.tensorboard": False,
    "tracking.wandb": None,
    "tracking.mlflow": None,
}
"""Removed settings, each with the one value that had no effect: with this value the setting is dropped. With any other
value the setting changed results, so it is kept, and the validation refuses it."""
REMOVED_FROM_ENTRIES: Mapping[str, frozenset[str]] = {"evaluation.sources": frozenset({"weight", "owner"})}
"""Lists, each with the settings that were removed from its entries."""
RENAMED: Mapping[str, str] = {
    "submodels.max_failures": "checkpoint.max_failures",
    "submodels.keep_moments": "submodels.keep_optimizer_state",
    "finetune.keep_moments": "finetune.keep_optimizer_state",
    **{f"tracking.{name}": f"tracking.trackers.{name}" for name in ("tensorboard", "wandb", "mlflow")},
}
_ADVICE: Mapping[str, str] = {
    "evaluation.ensemble": "remove it: export.keep_apart always measures the ensemble, and makes it the run's model"
}
"""What to do about removed settings for which another one does something similar."""
_VALUES: Mapping[tuple[str, str], tuple[str, str]] = {
    ("clusters.method", "random"): ("clusters.vectors", "random"),
    ("merge.router", "concat"): ("merge.router", "random"),
    ("submodels.optimizer.state", "bf16"): ("submodels.optimizer.precision", "pure_bf16"),
    ("finetune.optimizer.state", "bf16"): ("finetune.optimizer.precision", "pure_bf16"),
}
"""Values that a setting no longer accepts, each with the setting and value that replace it."""
_FORMER = {path for path, _ in _VALUES}.union(REMOVED, REMOVED_UNLESS_USED, RENAMED)
_SECTIONS = frozenset(path.rpartition(".")[0] for path in _FORMER)


def gone_values(raw: Any) -> list[str]:
    """Values in a stored configuration that no run can have any more, each as `SETTING VALUE (now VALUE)`.

    Args:
        raw: The configuration, as JSON.
    """
    if not isinstance(raw, Mapping):
        return []
    settings = dict(_leaves(raw, ""))
    router = settings.get("merge.router")
    matches: dict[str, Any] = dict.fromkeys(_MATCHES, False) if router == "random" else {}
    if router == "concat":  # replaced as a whole
        matches = {name: settings[name] for name in _MATCHES if name in settings}
    constants = {**CONSTANTS, **matches}
    return [
        f"{path} {json.dumps(settings[path])} (now {json.dumps(now)})"
        for path, now in constants.items()
        if path in settings and settings[path] != now and not _is_replaced(path, settings[path])
    ]


def remedy_of(path: str, value: Any) -> str | None:
    """What to do about a setting of an earlier version that a user writes; None if there was no such setting."""
    if _is_replaced(path, value):
        name, replacement = _VALUES[path, value]
        return f"set {name} to {replacement} instead"
    if path in RENAMED:
        return f"it is {RENAMED[path]} now"
    if path in _ADVICE:
        return _ADVICE[path]
    if CONSTANTS.get(path) is not None and path not in {old for old, _ in _VALUES}:
        return f"remove it: every run has {json.dumps(CONSTANTS[path])} now"
    return "remove it" if path in REMOVED or path in REMOVED_UNLESS_USED else None


def _is_replaced(path: str, value: Any) -> bool:
    return isinstance(value, str) and (path, value) in _VALUES


def stored_config(raw: Any) -> RunConfig:
    """A configuration that this or an earlier version stored.

    Raises:
        ValidationError: `raw` is no configuration of a known version, or has a removed value that nothing replaces.
        ValueError: `raw` has a wrong checksum.
    """
    return RunConfig.model_validate(_nested(checked(raw)) if isinstance(raw, Mapping) else raw)


def read_stored_config(content: bytes | None, location: Location) -> RunConfig:
    """The configuration in the `config.json` of a run.

    Args:
        content: Content of the file; None if it does not exist.
        location: Directory or URI of the run.

    Raises:
        DamagedError: The file is damaged.
        ValidationError: The file is of an unknown version.
    """
    try:
        return stored_config(json.loads(content or b"{}"))
    except ValidationError:
        raise
    except ValueError as error:
        raise DamagedError("config.json", "", str(location)) from error


def stored_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings by dotted path, under today's names and without removed settings."""
    kept = {
        RENAMED.get(path, path): _entries(path, value)
        for path, value in settings.items()
        if path not in REMOVED and (path, value) not in REMOVED_UNLESS_USED.items()
    }
    return kept | dict(new for (path, value), new in _VALUES.items() if settings.get(path) == value)


def _entries(path: str, value: Any) -> Any:
    removed = REMOVED_FROM_ENTRIES.get(path)
    if removed is None or not isinstance(value, list):
        return value
    return [_without(each, removed) if isinstance(each, dict) else each for each in value]


def _without(entry: dict[str, Any], removed: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in removed}


def _nested(raw: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for path, value in stored_settings(dict(_leaves(raw, ""))).items():
        *sections, last = path.split(".")
        node = result
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return result


def _leaves(raw: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted paths and values; a section is split only if one of its settings was renamed or removed."""
    for name, value in raw.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping) and any(each == path or each.startswith(f"{path}.") for each in _SECTIONS):
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value
