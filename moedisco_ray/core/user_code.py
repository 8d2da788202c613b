"""Functions of the user that a configuration names, found without an import: importing a module runs it."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import os
import pkgutil
import site
import sys
import tokenize
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    PathFinder,
    SourceFileLoader,
)
from pathlib import Path
from typing import Any

from moedisco_ray.core.config import RunConfig
from moedisco_ray.core.errors import ConfigError

_FOLDERS = "MOEDISCO_CODE_PATH"
"""Environment variable: folders with modules of the user that a run's processes on this machine may import."""


@dataclasses.dataclass(frozen=True)
class UserFunction:
    """A function that a run calls with the rows of a source.

    Attributes:
        field: Setting that names the function.
        name: Its name, as MODULE:FUNCTION.
        file: File of the module.
        source: Code of the module.
        packages: File and code of each package that contains the module, outermost first: importing the module runs
            them, too.
        folder: The configuration's folder, if the module was found there; None if Python finds the module by itself.
    """

    field: str
    name: str
    file: str
    source: str
    packages: tuple[tuple[str, str], ...] = ()
    folder: Path | None = None

    @property
    def module(self) -> str:
        return self.name.partition(":")[0]

    @property
    def code(self) -> dict[str, str]:
        """All code that runs when the module is imported, by file, except for what this code imports."""
        return {**dict(self.packages), self.file: self.source}

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


def offer_folder(folder: Path) -> None:
    """Let `imported` find the modules of a folder, in this process and in those that it starts."""
    named = [each for each in os.environ.get(_FOLDERS, "").split(os.pathsep) if each]
    os.environ[_FOLDERS] = os.pathsep.join(dict.fromkeys([*named, str(folder)]))


def offered_folders() -> dict[str, str]:
    """The variable that lets processes without this environment find the same modules; empty without folders."""
    return {_FOLDERS: os.environ[_FOLDERS]} if os.environ.get(_FOLDERS) else {}


def imported(name: str) -> Any:
    """Import a function of the user, given as MODULE:FUNCTION.

    A module of an offered folder never replaces another module of the same name: it comes last. PYTHONPATH would put it
    before the standard library. It is compiled from the code that was shown: `__pycache__` may hold other code.
    """
    for folder in os.environ.get(_FOLDERS, "").split(os.pathsep):
        if folder and folder not in sys.path:
            sys.path.append(folder)
            sys.path_hooks.insert(0, _source_finder(folder))
            for each in [known for known in sys.path_importer_cache if Path(known).is_relative_to(folder)]:
                del sys.path_importer_cache[each]
    return pkgutil.resolve_name(name)


class _SourceLoader(SourceFileLoader):
    """Loads a module from its source, and neither reads nor writes compiled code."""

    def path_stats(self, path: Any) -> Mapping[str, Any]:
        raise OSError(f"the age of {path} does not matter")  # without it, Python ignores compiled code


def _source_finder(folder: str) -> Callable[[str], Any]:
    """A path hook for a folder and its packages, but not for search path entries below it, such as site-packages."""
    found = FileFinder.path_hook((ExtensionFileLoader, EXTENSION_SUFFIXES), (_SourceLoader, SOURCE_SUFFIXES))

    def hook(path: str) -> Any:
        above = [each for each in sys.path if each and Path(path).is_relative_to(each)]
        if max(above, key=len, default="") != folder:
            raise ImportError(f"{path} is not part of {folder}")
        return found(path)

    return hook


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
    specs = _specs(module, None)
    if not specs:
        specs, beside = _specs(module, [str(folder.absolute())]), folder.absolute()
    if not specs:
        raise ConfigError(
            field,
            name,
            f"cannot be found: no module {module} in {folder} or where Python searches; write it next to "
            "the configuration, or install its package on all machines",
        )
    *packages, (origin, source) = [
        _code(field, name, each) for each in specs if each is specs[-1] or each.origin is not None
    ]
    try:
        defined = function in _defined(ast.parse(source).body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(
            field, name, f"cannot be imported ({type(error).__name__} in {origin}); correct the file"
        ) from error
    if not defined:
        raise ConfigError(
            field,
            name,
            f"is not defined by a `def` in {origin}, which may import or assign it; name a function "
            "that a `def` there defines",
        )
    return UserFunction(field, name, origin, source, packages=tuple(packages), folder=beside)


def _code(field: str, name: str, spec: ModuleSpec) -> tuple[str, str]:
    """File and code of a module.

    Raises:
        ConfigError: The module has no Python code.
    """
    source = _source(spec)
    if source is None:
        raise ConfigError(
            field,
            name,
            f"cannot be shown: {spec.origin or spec.name} is no Python code; wrap it in a function of a file",
        )
    return str(spec.origin), source


def _specs(module: str, path: Sequence[str] | None) -> list[ModuleSpec]:
    """Where the packages of a module, and the module itself, are stored; empty if it is not found.

    Unlike `importlib.util.find_spec`, this imports none of its packages.
    """
    specs: list[ModuleSpec] = []
    finders, parts = sys.meta_path if path is None else [PathFinder], module.split(".")
    for number in range(1, len(parts) + 1):
        name = ".".join(parts[:number])
        try:
            spec = next((found for finder in finders if (found := finder.find_spec(name, path)) is not None), None)
        except KeyError:  # a folder without __init__.py inside a package, which Python would have to import
            return []
        if spec is None:
            return []
        specs.append(spec)
        finders, path = sys.meta_path, spec.submodule_search_locations
        if path is None and number < len(parts):
            return []
    return specs


def _source(spec: ModuleSpec) -> str | None:
    """A module's code; None if it has no Python code."""
    with contextlib.suppress(OSError, SyntaxError, UnicodeDecodeError), tokenize.open(spec.origin or "") as file:
        return file.read() if Path(file.name).suffix == ".py" else None
    read = getattr(spec.loader, "get_source", None)  # a module in an archive
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
