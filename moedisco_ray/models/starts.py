"""Whether the model that a run starts from is the model that would be built, by the files' headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from moedisco_ray.core.config import LocalInit, Model, UpcycleInit
from moedisco_ray.core.errors import CheckpointError
from moedisco_ray.models.checkpoint import open_checkpoint, read_config
from moedisco_ray.models.dense import open_dense, upcycled_config
from moedisco_ray.models.hf import canonical_shapes, submodel_config


def check_start_tensors(model: Model) -> None:
    """Compare the tensors of the model that `model.init` names, by name and shape, with those of the model that a run builds.

    Headers and `config.json` are read, and the model is built on the meta device: seconds and little memory, whatever its size. Of
    the tensors themselves only biases are read that the family has no place for, since zeros may be left out.

    Raises:
        CheckpointError: A tensor is missing, left over or of another shape; a file cannot be read; or transformers cannot build a
            model from the configuration. The error names `model.init`'s setting.
    """
    start = model.init
    if not isinstance(start, LocalInit):
        return
    try:
        found, expected = _shapes(start, model)
    except CheckpointError as error:
        if error.field == start.setting:
            raise
        raise CheckpointError(start.setting, str(start.directory), f"{error.field} {error.value}: {error.remedy}") from error
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        reason = f"transformers builds no model from its config.json ({type(error).__name__}: {first})"
        raise CheckpointError(start.setting, str(start.directory), reason) from error
    _compare(found, expected, start)


def _shapes(start: LocalInit, model: Model) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes that are stored, and shapes that are needed, by canonical name."""
    if isinstance(start, UpcycleInit):
        stored: Any = open_dense(start.upcycle, model.family)
        whole = upcycled_config(start.upcycle, model.family, start.num_experts, start.num_experts_per_tok)
        config: Mapping[str, Any] = submodel_config(whole, 1)
    else:
        stored, config = open_checkpoint(start.directory), read_config(start.directory)
    return {key: stored.shape(key) for key in stored}, canonical_shapes(config)


def _compare(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], start: LocalInit) -> None:
    problems = {
        "is missing": sorted(expected.keys() - found.keys()),
        "has no place in the model that its config.json describes": sorted(found.keys() - expected.keys()),
        "has another shape than its config.json says": sorted(
            key for key in expected.keys() & found.keys() if expected[key] != found[key])}
    for problem, keys in problems.items():
        if keys:
            shapes = f" ({list(found[keys[0]])} for {list(expected[keys[0]])})" if keys[0] in found and keys[0] in expected else ""
            more = f", and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise CheckpointError(
                start.setting, str(start.directory),
                f"tensor {keys[0]} {problem}{shapes}{more}; name a directory whose weights belong to its config.json")
