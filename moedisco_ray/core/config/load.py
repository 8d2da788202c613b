"""Reads a YAML file and `--set` overrides into a checked configuration, or raises a one-line error."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moedisco_ray.core.config.inits import LocalInit
from moedisco_ray.core.config.mistakes import first_mistake
from moedisco_ray.core.config.places import is_reference, names_a_dataset, places, words
from moedisco_ray.core.config.run import RunConfig
from moedisco_ray.core.config.sections import Evaluation
from moedisco_ray.core.config.sources import Source
from moedisco_ray.core.config.start_files import named_tokenizer
from moedisco_ray.core.config.starts import looked_up, with_hub_names
from moedisco_ray.core.config.task_files import read_task_file
from moedisco_ray.core.config.yaml_text import YamlError, parse_yaml
from moedisco_ray.core.errors import ConfigError, UserError, raise_together
from moedisco_ray.core.limits import BF16_STEP
from moedisco_ray.core.store.checksums import CHECKSUM


def load_config(path: Path, overrides: Iterable[str] = (), *, for_service: bool = False) -> RunConfig:
    """Read a YAML (or JSON) file, apply `key.sub=value` overrides, and check all that does not depend on the corpus.

    Relative paths in the file are relative to the working directory.

    Args:
        path: The configuration file.
        overrides: Overrides such as `tokens.total=600000`.
        for_service: Whether a control service will receive the configuration; only a service can look up
            `run://RUN/model` and `dataset://NAME`.

    Raises:
        ConfigError: The configuration has a mistake; the error names field, value and remedy, and its `others` further
            mistakes.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            "CONFIG", str(path), f"cannot be read ({error.strerror}); `moedisco init {path}` writes one"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError("CONFIG", str(path), "is not a text file") from error
    try:
        raw = parse_yaml(text)
    except YamlError as error:
        raise ConfigError("CONFIG", str(path), str(error)) from error
    if not isinstance(raw, dict):
        raise ConfigError("CONFIG", str(path), "must hold a mapping, such as `name: demo`")
    raw.pop(CHECKSUM, None)  # of the `config.json` of a run, which may have been edited since
    for override in overrides:
        apply_override(raw, override)
    return check_config(raw, for_service=for_service)


def check_config(raw: Mapping[str, Any], *, for_service: bool = False) -> RunConfig:
    """Validate a configuration that is given as plain data, as `load_config` does for a file.

    Raises:
        ConfigError: The configuration has a mistake; the error names the first one, and its `others` the rest.
    """
    try:
        config = with_hub_names(RunConfig.model_validate(raw))
    except ValidationError as error:
        raise first_mistake(error.errors()) from error
    if for_service and any(is_reference(place.value) for place in places(config)):
        return config
    found = with_files(config, recorded=not for_service)
    if not for_service:
        return found
    return config.model_copy(update={"model": config.model.model_copy(update={"init": found.model.init})})


def with_files(config: RunConfig, *, recorded: bool) -> RunConfig:
    """Check the files that a configuration names, and return it with what is read of them; see `looked_up`.

    Nothing after this reads the model to start from to know its family and sizes.

    Raises:
        ConfigError: A path does not exist, or a setting contradicts the start; the error names the first mistake, and
            its `others` the rest.
        CheckpointError: The directory in `model.init` holds no model that `model.family` can start from.
        StorageError: The run is at a URI that does not respond.
    """
    raise_together(_references(config))  # the checks below would open them
    mistakes = list(_file_mistakes(config))
    try:
        config = looked_up(config, recorded=recorded)
    except UserError as error:
        mistakes.append(error)
    else:
        mistakes += _size_mistakes(config)
    raise_together((*mistakes, *_precision_mistakes(config)))
    return config


def check_evaluation(evaluation: Evaluation) -> None:
    """Check the files that an evaluation reads, and that lm-eval is installed if it is needed.

    Raises:
        ConfigError: A path does not exist, a name occurs twice, a task file holds no tasks, or lm-eval is missing.
    """
    raise_together(_evaluation_mistakes(evaluation))


def _references(config: RunConfig) -> Iterator[UserError]:
    for place in places(config):
        if names_a_dataset(place.value):
            yield ConfigError(
                place.field,
                words(place.value),
                "cannot be looked up: the data set was deleted, or this is not a control service, which alone knows "
                "data sets; submit the configuration (`moedisco submit`), or name a file or folder",
            )
        elif is_reference(place.value):
            yield ConfigError(
                place.field,
                words(place.value),
                "cannot be looked up: the run was deleted, or this is not a control service, which alone knows runs by "
                "name; submit the configuration (`moedisco submit`), or name a directory such as runs/NAME/model",
            )


def _file_mistakes(config: RunConfig) -> Iterator[UserError]:
    yield from _source_mistakes("corpus.sources", config.corpus.sources)
    yield from _evaluation_mistakes(config.evaluation)
    tokenizer = named_tokenizer(config.tokenizer)
    if tokenizer is not None and not os.path.isdir(tokenizer):  # noqa: PTH112 - see `_source_mistakes`
        yield ConfigError(
            "tokenizer.path",
            str(config.tokenizer.path),
            "no such directory; leave it out to use the tokenizer of model.init, or to train one",
        )


def _precision_mistakes(config: RunConfig) -> Iterator[UserError]:
    for name, optimizer, pool in reversed(config.trainings):
        if pool.cards_without_bf16 and optimizer.precision in ("bf16", "pure_bf16"):
            cards, remedy = " and ".join(pool.cards_without_bf16), "set it to fp32 or auto"
            yield ConfigError(f"{name}.optimizer.precision", optimizer.precision, f"{cards} has no bf16; {remedy}")


def _size_mistakes(config: RunConfig) -> Iterator[UserError]:
    """Sizes of experts that GPUs cannot multiply in bf16: rows of a grouped product are whole numbers of 16 bytes."""
    sizes = config.model.architecture
    has_several = config.clusters.count == "auto" or sizes.num_experts > config.clusters.count
    in_bf16 = [
        f"{name}.optimizer.precision"
        for name, optimizer, pool in reversed(config.trainings)
        if pool.gpu
        and optimizer.arithmetic(bf16=pool.bf16) == "bf16"
        and (has_several or name != "submodels")  # a single expert is a plain product
    ]
    if not in_bf16:
        return
    in_fp32 = f"set {' and '.join(in_bf16)} to fp32"
    for name in ("hidden_size", "moe_intermediate_size"):
        size = getattr(sizes, name)
        rule = f"GPUs compute experts in bf16 only if {name} is a multiple of {BF16_STEP}"
        if size % BF16_STEP and isinstance(config.model.init, LocalInit):
            yield ConfigError("model.init", str(config.model.init.place), f"{rule}, and it is {size}; {in_fp32}")
        elif size % BF16_STEP:
            next_size = -(-size // BF16_STEP) * BF16_STEP
            yield ConfigError(f"model.config.{name}", size, f"{rule}; set it to {next_size}, or {in_fp32}")


def _evaluation_mistakes(evaluation: Evaluation) -> Iterator[UserError]:
    yield from _source_mistakes("evaluation.sources", evaluation.sources)
    yield from _name_mistakes("evaluation.lm_eval", "task files", [path.stem for path in evaluation.lm_eval])
    for i, path in enumerate(evaluation.lm_eval):
        try:
            read_task_file(f"evaluation.lm_eval.{i}", path)
        except ConfigError as error:
            yield error
    if evaluation.lm_eval and importlib.util.find_spec("lm_eval") is None:
        files = [str(path) for path in evaluation.lm_eval]
        yield ConfigError("evaluation.lm_eval", files, "lm-eval is not installed; pip install 'moedisco-ray[lm-eval]'")


def _source_mistakes(field: str, sources: Sequence[Source]) -> Iterator[UserError]:
    for i, source in enumerate(sources):
        if source.data_owner is not None:  # only the owner's nodes may see it
            continue
        local = "://" not in source.path and source.path != "embedded" and not set("*?[") & set(source.path)
        if local and not os.path.exists(source.path):  # noqa: PTH110 - it also returns False for an invalid name
            yield ConfigError(f"{field}.{i}.path", source.path, "no such file or folder")
    yield from _name_mistakes(field, "sources", [source.name for source in sources if source.name is not None])


def _name_mistakes(field: str, things: str, names: Sequence[str]) -> Iterator[UserError]:
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield ConfigError(field, name, f"two {things} have this name; name each once")


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Apply one `key.sub=value` override to plain data.

    Raises:
        ConfigError: The override is malformed, or names a setting that does not exist.
    """
    key, sign, value = override.partition("=")
    if not sign or not key:
        raise ConfigError("--set", override, "must read key.sub=value, such as tokens.total=1000000")
    node: Any = raw
    *parents, last = key.strip().split(".")
    for part in parents:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, dict):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            raise ConfigError("--set", override, f"{part!r} is not a section")
    parsed = override_value(override, value)
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = parsed
    elif isinstance(node, dict):
        node[last] = parsed
    else:
        raise ConfigError("--set", override, f"{last!r} is not a setting")


def override_value(override: str, value: str) -> Any:
    """Plain data from the value of an override.

    Raises:
        ConfigError: The value is not YAML.
    """
    try:
        return parse_yaml(value)
    except YamlError as error:
        raise ConfigError("--set", override, f"the value {error}; quote it if it is a text") from error


def put(raw: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path of a configuration's plain data."""
    *sections, last = path.split(".")
    for section in sections:
        raw = raw[section]
    raw[last] = value
