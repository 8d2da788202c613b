"""What a task of `ray.tasks` does on its worker.

It imports only Ray, so that the worker reports its start without delay.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray


def work(call: list[ray.ObjectRef]) -> Iterator[Any]:
    """Yield None when the task has begun, then what the function returns.

    Args:
        call: Reference to the function with its arguments. Unpacking it imports torch, which takes seconds in which the
            slot is held already. The reference is in a list because Ray would fetch a bare one before the task begins.
    """
    yield None
    yield ray.get(call[0])()
