"""From a YAML file and `--set` overrides to a checked configuration, or one clear line."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from moedisco_ray.config.model import LocalInit
from moedisco_ray.config.run import RunConfig, check_division, check_gate
from moedisco_ray.config.sections import Evaluation, Source
from moedisco_ray.config.task_files import read_task_file
from moedisco_ray.errors import ConfigError

_INITS = tuple(init.__name__ for init in LocalInit.__subclasses__())


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a YAML (or JSON) file, apply `key.sub=value` overrides, check everything that needs no corpus.

    Relative paths inside the file are relative to the working directory, as on any command line.

    Raises:
        ConfigError: One line that names the field, the value and the remedy.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError("CONFIG", str(path), f"cannot be read ({error.strerror}); `moedisco init {path}` writes one") from error
    except UnicodeDecodeError as error:
        raise ConfigError("CONFIG", str(path), "is not a text file") from error
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f" at line {place.line + 1}" if place else ""
        raise ConfigError("CONFIG", str(path), f"is not YAML{where}: {getattr(error, 'problem', error)}") from error
    if not isinstance(raw, dict):
        raise ConfigError("CONFIG", str(path), "must hold a mapping, such as `name: demo`")
    for override in overrides:
        apply_override(raw, override)
    return check_config(raw)


def check_config(raw: Mapping[str, Any]) -> RunConfig:
    """Validate plain data.

    Raises:
        ConfigError: The first mistake, in one line.
    """
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        raise first_mistake(error.errors()) from error
    check_files(config)
    return config


def check_files(config: RunConfig) -> None:
    """Check what the configuration says of local files, before anything is started.

    Raises:
        ConfigError: A path that must exist does not.
        CheckpointError: The directory that `model.init` names holds no start for `model.family`.
    """
    _check_sources("corpus.sources", config.corpus.sources)
    check_evaluation(config.evaluation)
    if config.tokenizer.path is not None and not os.path.isdir(config.tokenizer.path):  # noqa: PTH112 - see `_check_sources`
        raise ConfigError(
            "tokenizer.path", str(config.tokenizer.path),
            "no such directory; leave it out to use the tokenizer of model.init, or to train one")
    if isinstance(config.model.init, LocalInit):
        try:
            architecture = config.model.architecture
        except ValidationError as error:
            raise first_mistake(error.errors()) from error
        checks: dict[str, Callable[[], None]] = {
            "clusters.count": lambda: check_division(architecture.num_experts, config.clusters.count),
            "finetune.dense_gate": lambda: check_gate(config.finetune.dense_gate, architecture)}
        for field, check in checks.items():
            try:
                check()
            except ValueError as error:
                raise ConfigError(field, None, str(error)) from error


def check_evaluation(evaluation: Evaluation) -> None:
    """Check what an evaluation reads, and that what it needs is installed.

    Raises:
        ConfigError: A path does not exist, two names are the same, a task file holds no tasks, or lm-eval is missing.
    """
    _check_sources("evaluation.sources", evaluation.sources)
    _check_names("evaluation.lm_eval", "task files", [path.stem for path in evaluation.lm_eval])
    for i, path in enumerate(evaluation.lm_eval):
        read_task_file(f"evaluation.lm_eval.{i}", path)
    if evaluation.lm_eval and importlib.util.find_spec("lm_eval") is None:
        files = [str(path) for path in evaluation.lm_eval]
        raise ConfigError("evaluation.lm_eval", files, "lm-eval is not installed; pip install 'moedisco-ray[lm-eval]'")


def _check_sources(field: str, sources: Sequence[Source]) -> None:
    for i, source in enumerate(sources):
        local = "://" not in source.path and source.path != "embedded" and not set("*?[") & set(source.path)
        if local and not os.path.exists(source.path):  # noqa: PTH110 - False for a name that no file system takes, too
            raise ConfigError(f"{field}.{i}.path", source.path, "no such file or folder")
    _check_names(field, "sources", [source.name for source in sources if source.name is not None])


def _check_names(field: str, things: str, names: Sequence[str]) -> None:
    for name in sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(field, name, f"two {things} have this name; name each once")


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value` in plain data.

    Raises:
        ConfigError: It does not read so, or names no setting of a section.
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
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError("--set", override, "the value is not YAML; quote it") from error
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        node[int(last)] = parsed
    elif isinstance(node, dict):
        node[last] = parsed
    else:
        raise ConfigError("--set", override, f"{last!r} is not a setting")


def put(raw: dict[str, Any], path: str, value: Any) -> None:
    """Set a setting, by its dotted path, in a configuration's own plain data."""
    *sections, last = path.split(".")
    for section in sections:
        raw = raw[section]
    raw[last] = value


def first_mistake(mistakes: Sequence[Mapping[str, Any]]) -> ConfigError:
    """What pydantic found, told as field, value and remedy.

    Args:
        mistakes: `ValidationError.errors()`, at least one.
    """
    # Unions report every member they tried: the user meant the section with the fewest mistakes, then the longest path,
    # then what breaks a rule of ours.
    section = Counter(_section(mistake) for mistake in mistakes)
    fewest = min((count for name, count in section.items() if name is not None), default=0)
    meant = [mistake for mistake in mistakes if _section(mistake) is None or section[_section(mistake)] == fewest]
    unknown = [m for m in meant if m["type"] == "extra_forbidden"]
    first = unknown[0] if unknown else max(meant, key=lambda m: (len(m["loc"]), m["type"] == "value_error"))
    known_union_tags = {"Architecture", "int", "constrained-int", "literal['random']", "literal['auto']"}
    parts = [
        str(part) for part in first["loc"]
        if str(part) not in known_union_tags and not str(part).startswith("literal[") and _init_in(part) is None]
    field = ".".join(parts)
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(parts[-1], _known_keys(parts[:-1]), n=1)
        hint = f"did you mean {close[0]!r}?" if close else "remove it; `moedisco schema` lists every setting"
        return ConfigError(field, None, f"no such setting; {hint}")
    if first["type"] == "missing":
        return ConfigError(field, None, "is missing; `moedisco init` writes a configuration with every setting")
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] != "value_error":  # pydantic's own words; ours begin with a field, whose case matters
        message = message[0].lower() + message[1:].replace("valid tuple", "list")
        message = re.sub(r"valid dictionary or instance of \w+", "section with settings of its own", message)
    if not field:  # a rule between sections: its message begins with the field
        field, _, message = message.partition(" ")
        return ConfigError(field, None, message)
    if isinstance(first["input"], (dict, BaseModel)):
        return ConfigError(field, None, message)
    return ConfigError(field, first["input"], message)


def _section(mistake: Mapping[str, Any]) -> str | None:
    """Which of `model.init`'s sections was tried."""
    return next((name for name in map(_init_in, mistake["loc"]) if name is not None), None)


def _init_in(part: object) -> str | None:
    # pydantic's tag of a section is its name, or `function-after[check(), Name]`.
    return next((name for name in _INITS if name in str(part)), None)


def _known_keys(path: list[str]) -> list[str]:
    schema: dict[str, Any] = RunConfig.model_json_schema()
    nodes: list[dict[str, Any]] = [schema]
    for part in path:
        found = [node.get("items", {}) if part.isdigit() else node.get("properties", {}).get(part, {}) for node in nodes]
        options = [option for node in found for option in (node, *node.get("anyOf", []))]
        nodes = [schema["$defs"][option["$ref"].rsplit("/", 1)[-1]] for option in options if "$ref" in option] or found
    return [key for node in nodes for key in node.get("properties", {})]
