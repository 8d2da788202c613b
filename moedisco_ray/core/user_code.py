"""Functions of the user that a configuration names, found without an import: importing a module runs it."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import site
import sys
import tokenize
from collections.abc import Collection, Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class UserFunction:
    """A function that a run calls with the rows of a source.

    Attributes:
        field: Setting that names the function.
        name: Its name, as MODULE:FUNCTION.
        file: File of the module.
        source: Code of the module.
        folder: The configuration's folder, if the module was found there; None if Python finds the module by itself.
    """

    field: str
    name: str
    file: str
    source: str
    folder: Path | None = None

    @property
    def module(self) -> str:
        """Name of the module."""
        return self.name.partition(":")[0]

    @property
    def is_installed(self) -> bool:
        """Whether the module is in a package that was installed, unlike a file elsewhere."""
        folders = {*site.getsitepackages(), site.getusersitepackages()}
        return any(Path(self.file).is_relative_to(folder) for folder in folders)


def user_functions(config: RunConfig, folder: Path) -> list[UserFunction]:
    """Find the functions that a configuration names, without importing their modules.

    Args:
        config: The configuration.
        folder: Folder of the configuration's file, whose modules it may name.

    Raises:
        ConfigError: A module cannot be found or read, is part of Python, or does not define the function itself.
    """
    return [_found(field, name, folder) for field, name in _named(config)]


def is_listed(name: str, allowed: Collection[str]) -> bool:
    """Whether a list of MODULE or MODULE:FUNCTION names a function; a package stands for its modules too."""
    module = name.partition(":")[0]
    return any(name == each or f"{module}.".startswith(f"{each}.") for each in allowed)


def check_allowed(config: RunConfig, allowed: Collection[str]) -> None:
    """Refuse a configuration that names a function which the user has not allowed.

    Raises:
        ConfigError: A function is not in the list.
    """
    for field, name in _named(config):
        if not is_listed(name, allowed):
            raise ConfigError(field, name, f"is code that the run would call; if you trust it, add --allow-code {name}")


def _named(config: RunConfig) -> Iterator[tuple[str, str]]:
    for section, sources in (("corpus", config.corpus.sources), ("evaluation", config.evaluation.sources)):
        for i, source in enumerate(sources):
            if source.map is not None:
                yield f"{section}.sources.{i}.map", source.map


def _found(field: str, name: str, folder: Path) -> UserFunction:
    module, _, function = name.partition(":")
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise ConfigError(field, name, "is part of Python, and not made for rows; name a function in a file of yours")
    beside = None
    spec = _spec(module, None)
    if spec is None:
        spec, beside = _spec(module, [str(folder)]), folder.absolute()
    if spec is None:
        raise ConfigError(
            field, name, f"cannot be found: no module {module} in {folder} or where Python searches; write it next to "
            "the configuration, or install its package on all machines")
    source = _source(spec)
    if source is None:
        raise ConfigError(
            field, name, f"cannot be shown: {spec.origin or module} is no Python code; wrap it in a function of a file")
    try:
        defined = function in _defined(ast.parse(source).body)
    except (SyntaxError, ValueError) as error:
        raise ConfigError(
            field, name, f"cannot be imported ({type(error).__name__} in {spec.origin}); correct the file") from error
    if not defined:
        raise ConfigError(
            field, name, f"is not defined by a `def` in {spec.origin}, which may import or assign it; name a function "
            "that a `def` there defines")
    return UserFunction(field, name, str(spec.origin), source, beside)


def _spec(module: str, path: Sequence[str] | None) -> ModuleSpec | None:
    """Where a module is stored; unlike `importlib.util.find_spec`, this imports none of its packages."""
    spec: ModuleSpec | None = None
    finders, parts = sys.meta_path if path is None else [PathFinder], module.split(".")
    for number in range(1, len(parts) + 1):
        name = ".".join(parts[:number])
        try:
            spec = next((found for finder in finders if (found := finder.find_spec(name, path)) is not None), None)
        except KeyError:    # a folder without __init__.py inside a package, which Python would have to import
            return None
        if spec is None:
            return None
        finders, path = sys.meta_path, spec.submodule_search_locations
        if path is None and number < len(parts):
            return None
    return spec


def _source(spec: ModuleSpec) -> str | None:
    """A module's code; None if it has no Python code."""
    with contextlib.suppress(OSError, SyntaxError, UnicodeDecodeError), tokenize.open(spec.origin or "") as file:
        return file.read() if Path(file.name).suffix == ".py" else None
    read = getattr(spec.loader, "get_source", None)     # a module in an archive
    with contextlib.suppress(ImportError, OSError):
        return None if read is None else read(spec.name)
    return None


def _defined(body: Sequence[ast.stmt]) -> Iterator[str]:
    """Names that `def` defines at the top level of a module, also inside `if` and `try`."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef):
            yield statement.name
        for part in ("body", "orelse", "handlers", "finalbody") if isinstance(statement, ast.If | ast.Try) else ():
            for each in getattr(statement, part, ()):
                yield from _defined(each.body if isinstance(each, ast.ExceptHandler) else [each])
