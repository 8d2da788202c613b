"""What one new file and one line here can add: commands, export formats, model files, trackers, rules of the merge.

The tables name functions and do not import them: configurations are checked against the names without torch, an
optional package is needed only by those who use what needs it, and no room imports `contrib`. CONTRIBUTING.md says what
each function takes and returns. Model families have a table of their own, in `core.families`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pkgutil
from collections.abc import Mapping
from typing import Any

from moedisco_ray.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Entry:
    """A function, or another value of a module, by its name.

    Attributes:
        name: `MODULE:FUNCTION`; of a program, the module alone.
        packages: Packages that it needs, of those that moedisco-ray does not install by default.
        extra: Extra of moedisco-ray that installs these packages.
    """

    name: str
    packages: tuple[str, ...] = ()
    extra: str = ""


@dataclasses.dataclass(frozen=True)
class ExportFormat(Entry):
    """A format of `moedisco export`.

    Attributes:
        title: What the command writes, for its help.
        suffix: End of the default name of the result, after the name of the run.
    """

    title: str = ""
    suffix: str = ""


@dataclasses.dataclass(frozen=True)
class ModelFile(Entry):
    """A kind of file that holds a whole model: a program that writes such a file as a Hugging Face directory.

    Attributes:
        title: Name of the kind, for errors.
        version: Number of the way in which the program converts a file; directories of another way are not used again.
    """

    title: str = ""
    version: int = 1


COMMANDS: tuple[Entry, ...] = (
    Entry("moedisco_ray.contrib.merge.command:commands"),
    Entry("moedisco_ray.contrib.experts.command:commands"),
    Entry("moedisco_ray.contrib.join.command:commands"),
)
"""Commands of the command line besides those of `cli` and `service`, in the order of the help: one `typer.Typer`
each."""

EXPORT_FORMATS: Mapping[str, ExportFormat] = {
    "hf": ExportFormat(
        "moedisco_ray.execution.export_run:export_run", title="a Hugging Face directory", suffix="-model"
    ),
    "gguf": ExportFormat(
        "moedisco_ray.contrib.gguf.exporting:export_gguf",
        ("gguf",),
        "gguf",
        title="a GGUF file for llama.cpp, Ollama and LM Studio",
        suffix=".gguf",
    ),
    "ensemble": ExportFormat(
        "moedisco_ray.execution.export_ensemble:export_ensemble",
        title="a directory with the sub-models as an ensemble, never merged",
        suffix="-ensemble",
    ),
}
"""Formats by the value of `--to`."""

MODEL_FILES: Mapping[str, ModelFile] = {
    ".gguf": ModelFile("moedisco_ray.contrib.gguf.reading", ("gguf", "accelerate"), "gguf", title="GGUF", version=2)
}
"""Kinds of model files by the end of their names."""

TRACKERS: Mapping[str, Entry] = {
    "tensorboard": Entry("moedisco_ray.contrib.trackers.tensorboard:open_tracker", ("tensorboard",), "tensorboard"),
    "wandb": Entry("moedisco_ray.contrib.trackers.wandb:open_tracker", ("wandb",), "wandb"),
    "mlflow": Entry("moedisco_ray.contrib.trackers.mlflow:open_tracker", ("mlflow",), "mlflow"),
}
"""Experiment trackers by the name in `tracking.trackers`."""

BACKBONE_RULES: Mapping[str, Entry] = {
    "uniform": Entry("moedisco_ray.stages.merge.backbone:UNIFORM"),
    "token_weighted": Entry("moedisco_ray.stages.merge.backbone:TOKEN_WEIGHTED"),
}
"""Rules by which the merge combines the sub-models' backbones, by the name in `merge.backbone`."""

ROUTER_METHODS: Mapping[str, Entry] = {
    "ridge": Entry("moedisco_ray.stages.merge.router_init:ridge_directions"),
    "random": Entry("moedisco_ray.stages.merge.router_init:random_directions"),
    "kept": Entry("moedisco_ray.stages.merge.router_init:no_directions"),
}
"""Methods by which the merge computes the routers, by the name in `merge.router`."""


def missing(entry: Entry) -> str | None:
    """What to do about a package that an entry needs and that is not installed; None if all are installed."""
    for package in entry.packages:
        if importlib.util.find_spec(package) is None:
            return f"needs the package {package}; pip install 'moedisco-ray[{entry.extra}]'"
    return None


def load(entry: Entry, setting: str = "", value: object = None) -> Any:
    """Import what an entry names.

    Args:
        entry: The entry.
        setting: Setting or option that names the entry; errors name it.
        value: Its value.

    Raises:
        ConfigError: A package that it needs is not installed.
    """
    if (remedy := missing(entry)) is not None:
        raise ConfigError(setting, value, remedy)
    return pkgutil.resolve_name(entry.name)
