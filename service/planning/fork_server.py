"""A process that forks a child for each task, with limits that the kernel enforces.

A pool of `concurrent.futures` cannot end a task that is running, and `multiprocessing` imports the program's main
module again in every child. Here a small process without threads has imported all that a task needs. A child starts
within milliseconds, shares that memory, serves one task and ends, so that nothing of one caller's request remains for
the next one.

The service sends the server one socket per task. The child reads the task from it until the end of the stream, and
writes the outcome. The server adds one byte when the child has ended: the signal that ended it, or 0.
"""

from __future__ import annotations

import dataclasses
import os
import resource
import selectors
import signal
import socket
import traceback

from moedisco_ray.core.errors import UserError
from service.errors import ServiceError, TooCostly
from service.planning.messages import error_to_json, failure_to_json, outcome_to_json, task_from_message
from service.planning.task import done

_NICENESS = 10
"""Added to the niceness of children, so that the service itself is served first."""
_BLOCK = 2**16


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one task.

    Attributes:
        seconds: Time until the child is ended.
        processor_seconds: Processor time until the child is ended.
        memory: Memory that the child may write (bytes), including what it shares with the server.
    """

    seconds: float = 20.0
    processor_seconds: int = 5
    memory: int = 2**30


def serve(control: socket.socket, limits: Limits) -> None:
    """Serve tasks until the service closes its end of the connection.

    Args:
        control: Connection to the service, which sends the socket of each task with one byte.
        limits: Limits of each task.
    """
    os.environ["RUST_BACKTRACE"] = "0"  # without memory, a backtrace of pydantic's core waits for itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the service, which then closes the connection
    ended, wake = os.pipe()
    for end in (ended, wake):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(ended, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in selector.select()}
            if ended in ready:
                os.read(ended, _BLOCK)
                _reap(children)
            if control.fileno() in ready:
                received, descriptors, _, _ = socket.recv_fds(control, 1, 1)
                if not received:
                    break
                task = socket.socket(fileno=descriptors[0])
                child = os.fork()
                if child == 0:
                    control.close()
                    for other in children.values():  # while one is open, the service waits for the rest of that answer
                        other.close()
                    _run(task, limits)
                children[child] = task
    for child in children:
        os.kill(child, signal.SIGKILL)


def _reap(children: dict[int, socket.socket]) -> None:
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            return
        with children.pop(child) as task:
            code = os.waitstatus_to_exitcode(status)
            _send(task, bytes([-code if code < 0 else 0]))


def _run(task: socket.socket, limits: Limits) -> None:
    """Serve one task in a child, and end it."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        # The default action of SIGALRM ends the process, also inside of a regular expression that holds the
        # interpreter's lock.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        # RLIMIT_AS would also count addresses that threads and allocators reserve without using them.
        resource.setrlimit(resource.RLIMIT_DATA, (limits.memory, limits.memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.nice(_NICENESS)
        request = bytearray()
        while block := task.recv(_BLOCK):
            request += block
        # Only now: a service that is still writing when the child ends would lose what the server adds.
        signal.setitimer(signal.ITIMER_REAL, limits.seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (limits.processor_seconds, limits.processor_seconds + 1))
        _send(task, answer_to(bytes(request), limits))
        status = 0
    finally:
        os._exit(status)


def answer_to(request: bytes, limits: Limits) -> bytes:
    try:
        return outcome_to_json(done(task_from_message(request)))
    except (UserError, ServiceError) as error:
        return error_to_json(error)
    except (MemoryError, RecursionError):
        return error_to_json(
            TooCostly(
                f"planning this configuration takes more than {limits.memory >> 20} MiB of memory, the limit for a "
                "request; shorten its lists and texts, or name smaller files"
            )
        )
    except Exception:  # noqa: BLE001 - the service logs it and answers with status 500
        return failure_to_json(traceback.format_exc())


def _send(task: socket.socket, content: bytes) -> None:
    try:
        task.sendall(content)
    except OSError:  # the service no longer waits
        return
