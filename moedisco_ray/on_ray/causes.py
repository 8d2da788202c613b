"""What is behind an error of Ray, by its type wherever Ray gives it one.

The text of an error may hold a traceback, and with it paths and source lines, whose words say nothing of what happened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ray.exceptions import NodeDiedError, RayActorError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from moedisco_ray.on_ray.train_callbacks import last_line

_NODE_GONE = re.compile(
    r"node (has died|was (forcibly )?(terminated|preempted)|is dead|died|is being drained)|\b(by|node) preemption", re.IGNORECASE)
"""In the words of Ray, whose actor died with its node."""


def unwrapped(error: BaseException) -> BaseException:
    """What ended a worker, without what Ray has put around it."""
    while isinstance(error, WorkerHealthCheckFailedError | RayTaskError):
        error = error.health_check_failure if isinstance(error, WorkerHealthCheckFailedError) else error.cause
    return error


def node_gone(error: BaseException) -> bool:
    """Whether an error says that a node is gone, or about to go."""
    deaths = [cause for cause in _chain(error) if isinstance(cause, RayActorError | NodeDiedError)]
    if deaths:
        return any(_with_its_node(death) for death in deaths)
    # Of a worker that dies as it starts, Ray Train has but the words, and those at the end of a traceback.
    return bool(_NODE_GONE.search(last_line(error)))


def _with_its_node(death: BaseException) -> bool:
    if isinstance(death, NodeDiedError) or (isinstance(death, RayActorError) and death.preempted):
        return True
    # The text of an actor whose making failed is the traceback of that.
    made = isinstance(death, RayActorError) and not death.actor_init_failed
    return made and bool(_NODE_GONE.search(str(death)))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and each that it was raised from, as far as Ray has kept them."""
    found: BaseException | None = error
    while found is not None:
        found = unwrapped(found)
        yield found
        found = found.__cause__
