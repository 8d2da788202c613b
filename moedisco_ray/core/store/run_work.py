"""Wrap functions that read and write files of a run, so that they can be called on any machine.

A wrapped function verifies its input files before the call. If the run is at a URI, it also fetches them, and publishes
its output files after the call.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from moedisco_ray.core.store.run_store import RunStore

T = TypeVar("T")


class Files(NamedTuple):
    """Files and directories of a run that a function reads and writes."""

    reads: Sequence[Path] = ()
    writes: Sequence[Path] = ()


def on_files(store: RunStore, files: Files, function: Callable[..., T], *args: Any, **kwargs: Any) -> Callable[[], T]:
    """Wrap a call of a function so that it can be made on any machine.

    Args:
        store: The run.
        files: Files that the function reads and writes.
        function: The function.
        args: Its positional arguments, which may hold paths of the run.
        kwargs: Its named arguments.
    """
    return _Call(store, files, functools.partial(function, *args, **kwargs))


def movable(store: RunStore, function: Callable[..., T]) -> Callable[..., T]:
    """Wrap a function that holds paths of a run so that it can be called on any machine.

    No files are fetched or published.

    Args:
        store: The run.
        function: The function.
    """
    return _Movable(store, function) if store.is_remote else function  # otherwise, paths are the same on all machines


def unpickled(data: bytes) -> Any:
    """Unpickle the output of `RunStore.dumps`; paths in the run directory become paths on this machine."""
    return pickle.loads(data)  # noqa: S301  # from our own process on another machine


@dataclasses.dataclass(frozen=True)
class _Call(Generic[T]):
    store: RunStore
    files: Files
    call: Callable[[], T]

    def __call__(self) -> T:
        for path in self.files.writes:
            path.parent.mkdir(parents=True, exist_ok=True)
        with self.store.using(*self.files.reads):
            result = self.call()
        self.store.publish(*self.files.writes)
        return result

    @property
    def __name__(self) -> str:
        found: str = getattr(self.call, "func", self.call).__name__
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        if not self.store.is_remote:  # paths are the same on all machines
            return _Call, (self.store, self.files, self.call)
        return _call_of, (self.store, self.store.dumps((self.files, self.call)))


def _call_of(store: RunStore, data: bytes) -> _Call[Any]:
    return _Call(store, *unpickled(data))


@dataclasses.dataclass(frozen=True)
class _Movable(Generic[T]):
    store: RunStore
    function: Callable[..., T]

    def __call__(self, *args: Any) -> T:
        return self.function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _movable_of, (self.store, self.store.dumps(self.function))


def _movable_of(store: RunStore, data: bytes) -> _Movable[Any]:
    return _Movable(store, unpickled(data))
