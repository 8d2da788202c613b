"""`moedisco experts`: write an MoE with some experts of a model, with experts of other models, or both."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from moedisco_ray.core.artifacts import reporting_full_disk, write_json
from moedisco_ray.core.config import EXPERT_COUNTS
from moedisco_ray.core.errors import CheckpointError, ConfigError
from moedisco_ray.core.run_models import finished_model
from moedisco_ray.execution.merge_models import FREE_FIELDS, check_new, complete
from moedisco_ray.models import (
    Checkpoint,
    Chosen,
    config_with_experts,
    expert_count,
    from_values,
    open_complete,
    read_config,
    with_experts,
    write_checkpoint,
    write_config,
)
from moedisco_ray.stages.export.origin import Origin

_TRAINING_FIELDS = {"router_aux_loss_coef", "output_router_logits", "router_jitter_noise", "rope_theta", "rope_scaling"}
"""Further fields that may differ: they matter in training alone, or `rope_parameters` holds them too."""


def choose_experts(model: str, experts: Sequence[str], output: Path, *, top_k: int | None = None) -> dict[str, Any]:
    """Write an MoE that has the backbone of a model, and the chosen experts with their router rows, in this order.

    Args:
        model: Directory or URI of a finished run, or the directory of an exported model.
        experts: Numbers of experts, such as `0,2-5`; of another model as `RUN_DIR:0,2-5`. The other model must have the same
            architecture, but for the number of experts.
        output: Directory to write; it must be new or empty.
        top_k: Experts per token; None: as in the model, but at most all experts.

    Returns:
        `directory`, `family`, `top_k`, and `experts`: model and number of each expert.

    Raises:
        ConfigError: There is no such expert, or the router cannot have this number of experts or this top-k.
        CheckpointError: A model cannot be read, or the models have different architectures.
        RunDirError: A location holds no model, or the output is not empty or cannot be written.
    """
    check_new(output)
    opened, chosen = {model: _open(model)}, list[Chosen]()
    for text in experts:
        place, _, numbers = text.rpartition(":")
        name = place or model
        if name not in opened:
            opened[name] = _open(name)
        index = list(opened).index(name)
        chosen += [Chosen(index, number) for number in _numbers(text, numbers, expert_count(opened[name].config))]
    names = list(opened)
    first = opened[model]
    for name, other in opened.items():
        _check_alike(first, other, name)
    values, family = config_with_experts(first.config, len(chosen), top_k), first.model_map.family
    output.parent.mkdir(parents=True, exist_ok=True)
    with reporting_full_disk(output), tempfile.TemporaryDirectory(dir=output.parent, prefix=".experts-") as scratch:
        draft = Path(scratch) / "model"
        write_checkpoint(draft, with_experts(list(opened.values()), first.model_map, chosen), values)
        complete(draft, Origin(first.directory))
        # `complete` takes the model's own numbers.
        write_config(draft, config_with_experts(read_config(draft), len(chosen), top_k))
        result = {
            "directory": str(output), "family": family.name, "top_k": values[family.router.top_k_field],
            "experts": [{"model": names[each.model], "expert": each.expert} for each in chosen]}
        write_json(draft / "experts.json", result)
        (draft / "README.md").write_text(_card(output.name, model, result), encoding="utf-8")
        draft.rename(output)
    return result


def _open(name: str) -> Checkpoint:
    found, _ = open_complete(finished_model(name))
    return found


def _numbers(text: str, numbers: str, count: int) -> Iterator[int]:
    """The numbers that a text such as `0,2-5` names, in its order."""
    for part in numbers.split(","):
        begin, dash, end = part.partition("-")
        if not (begin.isdecimal() and (end.isdecimal() if dash else True)):
            raise ConfigError("EXPERTS", text, "is no list of experts; write 0,2-5, or RUN_DIR:0,2-5 for those of another model")
        first, last = int(begin), int(end or begin)
        if not first <= last < count:
            raise ConfigError("EXPERTS", text, f"names an expert that is not there; the model has 0 to {count - 1}")
        yield from range(first, last + 1)


def _check_alike(first: Checkpoint, other: Checkpoint, name: str) -> None:
    """Refuse a model of another architecture; the number of experts may differ.

    Raises:
        CheckpointError: A field of the configuration differs.
    """
    mine, others = (from_values(model.config).to_dict() for model in (first, other))    # with the defaults of missing fields
    free = {*FREE_FIELDS, *_TRAINING_FIELDS, *EXPERT_COUNTS, first.model_map.family.num_experts_field, "experts_per_token"}
    for field in sorted((mine.keys() | others.keys()) - free, key=lambda field: (field != "model_type", field)):
        own, theirs = mine.get(field), others.get(field)
        if own != theirs:
            raise CheckpointError(
                "EXPERTS", name, f"has {field} {theirs!r}, but RUN_DIR has {own!r}; take experts of a model like it")


def _card(name: str, model: str, result: Mapping[str, Any]) -> str:
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["mixture-of-experts", "moe-disco", result["family"]])
    experts = "\n".join(f"* expert {number}: {each['expert']} of {each['model']}" for number, each in enumerate(result["experts"]))
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n`moedisco experts` made this Mixture-of-Experts model ({result['family']}, top-"
        f"{result['top_k']}) from {model}. Measure it before use: the routers were not computed for these experts together."
        f"\n\n{experts}\n")
