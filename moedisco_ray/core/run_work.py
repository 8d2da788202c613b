"""Work on files of a run, on any machine: it fetches what it reads before, and publishes what it has written after.

For a run in a directory that all machines share, work stays as it is.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from moedisco_ray.core.run_store import RunStore

I = TypeVar("I")
T = TypeVar("T")


class Files(NamedTuple):
    """Files and directories of a run that a function reads and writes."""

    reads: Sequence[Path] = ()
    writes: Sequence[Path] = ()


def on_files(store: RunStore, files: Files, function: Callable[..., T], *args: Any, **kwargs: Any) -> Callable[[], T]:
    """A call of a function, to be made on any machine.

    Args:
        store: The run.
        files: What the function reads and writes.
        function: The function.
        args: Its positional arguments, which may hold paths of the run.
        kwargs: Its named arguments.
    """
    call = functools.partial(function, *args, **kwargs)
    return _Call(store, files, call) if store.is_remote else _named(call, function)


def on_each(
    store: RunStore, function: Callable[[I], T], also: Sequence[Path] = (), writes: Callable[[T], Sequence[Path]] | None = None,
) -> Callable[[I], T]:
    """A function of one item, to be called on any machine. It reads the paths in the item, and writes those in its result.

    Args:
        store: The run.
        function: The function.
        also: Paths that it reads for every item.
        writes: The paths that it has written, from its result; None: those in the result.
    """
    return _Each(store, function, also, writes) if store.is_remote else function


def unpickled(data: bytes) -> Any:
    """What `RunStore.dumps` has pickled, with the paths of this machine."""
    return pickle.loads(data)   # noqa: S301  # from our own process on another machine


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
        return _call_of, (self.store, self.store.dumps((self.files, self.call)))


def _call_of(store: RunStore, data: bytes) -> _Call[Any]:
    return _Call(store, *unpickled(data))


@dataclasses.dataclass(frozen=True)
class _Each(Generic[I, T]):
    store: RunStore
    function: Callable[[I], T]
    also: Sequence[Path]
    writes: Callable[[T], Sequence[Path]] | None

    def __call__(self, item: I) -> T:
        with self.store.using(*self.also, *self.store.paths_in(item)):
            result = self.function(item)
        self.store.publish(*(self.store.paths_in(result) if self.writes is None else self.writes(result)))
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return _each_of, (self.store, self.store.dumps((self.function, self.also, self.writes)))


def _each_of(store: RunStore, data: bytes) -> _Each[Any, Any]:
    return _Each(store, *unpickled(data))


def _named(call: functools.partial[T], function: Callable[..., T]) -> Callable[[], T]:
    functools.update_wrapper(call, function, updated=())
    return call
