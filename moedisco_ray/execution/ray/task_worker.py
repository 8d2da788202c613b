"""What a task of `on_ray.tasks` does on its worker. It imports Ray alone, so that a worker can say at once that it has begun."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray


def work(call: list[ray.ObjectRef]) -> Iterator[Any]:
    """Say that the task has begun, by giving None; then give what the function returns.

    Args:
        call: The function, its arguments and its named arguments, in the object store: to unpack them is to import torch, for
            seconds in which the slot is held already. In a list, because Ray would fetch a bare reference first.
    """
    yield None
    function, args, kwargs = ray.get(call[0])
    yield function(*args, **kwargs)
