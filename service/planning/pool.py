"""Runs tasks in processes with limits, and gives each owner one place for estimates and one for submissions."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Literal

from starlette.concurrency import run_in_threadpool

from service.errors import Overloaded, TooCostly, TooMany
from service.planning.fork_server import Limits
from service.planning.messages import outcome_from_json, task_to_message
from service.planning.task import Outcome, Task

Kind = Literal["estimate", "submission"]

AT_ONCE = 8
"""Maximum number of estimates that are computed at the same time, and of submissions."""
MOST_WAITING_SUBMISSIONS = 32
"""Maximum number of submissions of one owner that wait for the one that is being planned."""
MOST_WAITING = 512
"""Maximum number of requests that wait, of all owners."""
_RETRY_SECONDS = 1.0
"""Wait that is suggested to a client whose request was refused."""
_START_SECONDS = 60.0
"""Maximum time for the fork server to start, in seconds, on a machine that is very busy."""
_END_SECONDS = 2.0
"""Maximum time for the fork server to end before it is killed (s). Its children then end at their own deadlines."""
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that no limit of a task sends: another program did, or the kernel when the machine ran out of memory."""


class Places:
    """Places for tasks of one kind: each owner has one, and `AT_ONCE` tasks run at the same time.

    With estimates, the newest counts: an owner's waiting estimate is refused when another one arrives, because a form
    sends one after each change. Submissions wait for each other.
    """

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._lock = threading.Lock()
        self._running: set[str] = set()
        self._waiting: list[tuple[str, Future[None]]] = []

    @property
    def waiting(self) -> int:
        """Number of requests that wait for their place."""
        return len(self._waiting)

    @contextlib.asynccontextmanager
    async def taken(self, owner: str) -> AsyncIterator[None]:
        """Wait for the owner's place, and hold it inside an `async with` block.

        Raises:
            TooMany: A newer estimate of the owner has arrived, or too many of the owner's submissions wait.
            Overloaded: Too many requests wait.
        """
        turn = self._queue(owner)
        try:
            await asyncio.wrap_future(turn)
            yield
        finally:
            self._leave(owner, turn)

    def _queue(self, owner: str) -> Future[None]:
        turn: Future[None] = Future()
        with self._lock:
            earlier = [each for name, each in self._waiting if name == owner]
            if self._kind == "submission" and len(earlier) >= MOST_WAITING_SUBMISSIONS:
                raise TooMany(
                    f"{len(earlier)} of your submissions are waiting to be planned, the limit", _RETRY_SECONDS
                )
            if self._kind == "estimate":
                self._waiting = [(name, each) for name, each in self._waiting if name != owner]
                for each in earlier:
                    if each.set_running_or_notify_cancel():
                        each.set_exception(
                            TooMany(
                                "a newer estimate of yours has taken the place of this one; one at a time is computed",
                                _RETRY_SECONDS,
                            )
                        )
            if len(self._waiting) >= MOST_WAITING:
                raise Overloaded("too many requests wait to be planned; try again later")
            self._waiting.append((owner, turn))
            self._admit()
        return turn

    def _leave(self, owner: str, turn: Future[None]) -> None:
        with self._lock:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._running.discard(owner)
            else:
                self._waiting = [(name, each) for name, each in self._waiting if each is not turn]
            self._admit()

    def _admit(self) -> None:
        for owner, turn in tuple(self._waiting):
            if len(self._running) < AT_ONCE and owner not in self._running:
                self._waiting.remove((owner, turn))
                # A future that is cancelled takes no place: its request has ended.
                if turn.set_running_or_notify_cancel():
                    self._running.add(owner)
                    turn.set_result(None)


class PlanningPool:
    """The fork server, started with the first task, and the places of the owners. Usable from several event loops.

    Args:
        limits: Limits of each task.
    """

    def __init__(self, limits: Limits = Limits()) -> None:  # noqa: B008 - it is frozen
        self._limits = limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self.places = {kind: Places(kind) for kind in ("estimate", "submission")}

    async def done(self, task: Task) -> Outcome:
        """The outcome of a task; see `service.planning.task.done`. The caller holds a place.

        Raises:
            ServiceError: The task was refused; for mistakes in the configuration, this is `InvalidRequest`.
            TooCostly: The task exceeds a limit.
            Overloaded: The process has died.
        """
        ours, theirs = socket.socketpair()
        try:
            # In a thread, because a fork server that hangs takes a moment to replace.
            await run_in_threadpool(self._hand_over, theirs)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            async with asyncio.timeout(self._limits.seconds + _START_SECONDS):
                writer.write(task_to_message(task))
                with contextlib.suppress(ConnectionError):
                    await writer.drain()
                    writer.write_eof()
                answer = await reader.read()
        except (TimeoutError, ConnectionError) as error:
            raise _died() from error
        finally:
            writer.close()
        if not answer:
            raise _died()
        if len(answer) == 1 or answer[-1]:
            raise _died() if answer[-1] in _FROM_OUTSIDE else self._exceeded(answer[-1])
        # In a thread, because the service checks a run's configuration again.
        return await run_in_threadpool(outcome_from_json, answer[:-1])

    def close(self) -> None:
        """End the fork server and its children."""
        with self._lock:
            self._end()

    def _hand_over(self, task: socket.socket) -> None:
        with self._lock:
            for _ in range(2):
                if self._process is None or self._process.poll() is not None:
                    self._end()
                    self._start()
                assert self._control is not None  # noqa: S101 - `_start` has made it
                # The server has just died, or hangs and has left some 250 tasks unread.
                with contextlib.suppress(OSError):
                    socket.send_fds(self._control, [b"+"], [task.fileno()])
                    return
                self._end()
        raise _died()

    def _start(self) -> None:
        self._control, theirs = socket.socketpair()
        self._control.settimeout(0)
        with theirs:
            # Without `-P`, the directory in which the operator starts the service could bring other modules.
            self._process = subprocess.Popen(  # noqa: S603 - no text of a user is in it
                [sys.executable, "-P", "-m", "service.planning", json.dumps(dataclasses.asdict(self._limits))],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._control = self._process = None

    def _exceeded(self, ended_by: int) -> TooCostly:
        """The error for a child without an outcome, by the signal that ended it.

        Without memory, a child may also exit without a signal (0).
        """
        limits = {
            signal.SIGALRM: f"{self._limits.seconds:g} s",
            signal.SIGXCPU: f"{self._limits.processor_seconds} s of processor time",
        }
        limit = limits.get(signal.Signals(ended_by)) if ended_by else None
        return TooCostly(
            f"planning this configuration takes more than {limit or f'{self._limits.memory >> 20} MiB of memory'}, the "
            "limit for a request; shorten its lists and texts, or name smaller files and storage that answers"
        )


def _died() -> Overloaded:
    return Overloaded("the process that plans requests has ended; try again")
