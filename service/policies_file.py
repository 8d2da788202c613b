"""Reads the operator's policies from a YAML file."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from moedisco_ray.core.config.yaml_text import YamlError, parse_yaml
from moedisco_ray.core.errors import ConfigError
from service.domain.policies import Policies

_KNOWN = "`moedisco policies show --json` shows how policies are written"


def load_policies(path: Path) -> Policies:
    """Read policies from a file with the sections `default` and `owners`.

    Raises:
        ConfigError: The file cannot be read, is not YAML, or sets something that policies do not have.
    """
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("--policies", str(path), f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError("--policies", str(path), "is not a text file") from error
    except YamlError as error:
        raise ConfigError("--policies", str(path), str(error)) from error
    if not isinstance(raw, dict):
        raise ConfigError("--policies", str(path), f"must contain the sections `default` and `owners`; {_KNOWN}")
    return check_policies(raw, str(path))


def check_policies(raw: dict[str, object], place: str) -> Policies:
    """Validate policies from a source that error messages call `place`.

    Raises:
        ConfigError: The policies are not valid; the message describes the first mistake.
    """
    try:
        return Policies.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "[key]")
    if first["type"] == "extra_forbidden":
        raise ConfigError(field, None, f"no such setting in {place}; {_KNOWN}")
    message = first["msg"].removeprefix("Value error, ")
    value = first["input"] if isinstance(first["input"], str | int | float) else None
    raise ConfigError(field, value, f"{message[0].lower()}{message[1:]} ({place})")
