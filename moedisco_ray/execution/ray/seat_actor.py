"""The actor of a seat: a process that holds a slot and runs functions.

It starts quickly, because this module imports only Ray and a policy.

A seat outlives its driver, and ends when the run's mailbox has ended, which keeps it meanwhile: nothing else would end
it, and its slot would be paid for until someone notices.

Whatever a function leaves behind must not affect the next one in the same process: GPU memory, compiled code, or a GPU
context that an error has broken.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayError

from moedisco_ray.policies.leasing import Silence, seat_stays

_MAX_LEFT_BYTES = 64 << 20
"""GPU memory that a function may leave allocated (bytes): CUDA's libraries keep workspaces, which are smaller than
this."""
WATCH_SECONDS = 10.0
"""Interval at which a seat asks whether the mailbox lives, and time for the answer, in seconds."""


class Seat:
    """Runs functions in the process that holds a slot, one after the other. Ray shows the class under this name.

    Args:
        name: Name of the actor: run, pool and number.
        mailbox: The run's mailbox actor; None if Ray ends the seat with its driver.
    """

    def __init__(self, name: str = "seat", mailbox: ActorHandle | None = None) -> None:
        self._name = name
        self._work = ""
        self._attempt = ""
        self._error: Exception | None = None
        self._left_bytes = 0
        self._has_run = False
        if not ray.get_gpu_ids():
            # Ray does not hide GPUs from an actor that holds none, and Ray Train's local mode would train on any GPU
            # that it sees.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if mailbox is not None:
            threading.Thread(target=self._stay, args=(mailbox,), name="mailbox-watch", daemon=True).start()

    def __repr__(self) -> str:
        """The seat and its work, with which Ray begins each line that the process prints."""
        return f"{self._name} {self._work}".rstrip()

    def place(self) -> tuple[str, str]:
        """Id of the seat's node, and the indices of its GPUs there.

        Raises:
            RuntimeError: An earlier function left memory allocated on the GPU, so that the next one might not fit.
        """
        if self._left_bytes > _MAX_LEFT_BYTES:
            raise RuntimeError(f"earlier work left {self._left_bytes} bytes on the GPU")
        cards = ",".join(str(index) for index in ray.get_gpu_ids())
        return ray.get_runtime_context().get_node_id(), cards

    def check(self, function: Callable[[], None]) -> None:
        """Call a function that raises an error if the slot is of no use, before the first work."""
        function()

    def run(self, function: Callable[[], Any], work: str = "", attempt: str = "") -> Any:
        """Call a function, then free the memory that it left.

        If the function raises an error, the caller must end this process.

        Args:
            function: The function.
            work: What it does, for people.
            attempt: Id with which `join` finds it.
        """
        self._work, self._attempt, self._error = work, attempt, None
        try:
            found = function()
            self._left_bytes = clear(sys.modules)
        except Exception as error:
            self._error = error
            raise
        finally:
            self._work = ""
        if not self._has_run:
            # the modules that the first function has imported; to look through them takes a third of a second
            gc.freeze()
            self._has_run = True
        return found

    def join(self, attempt: str) -> bool:
        """Wait for a function that an earlier driver has called; returns False if it never began.

        Calls run one after the other, so this one begins when that of the function has ended.

        Raises:
            Exception: The error that the function raised.
        """
        if self._attempt != attempt:
            return False
        if self._error is not None:
            raise self._error
        return True

    def leave(self) -> None:
        """End this process; Ray's list of actors shows that it was not killed."""
        ray.actor.exit_actor()

    def _stay(self, mailbox: ActorHandle) -> None:
        """End this process once its mailbox has ended, and the work on it has saved a checkpoint."""
        silence = Silence()
        ended: Silence | None = None
        while seat_stays(silence.seconds(), None if ended is None else ended.seconds(), works=bool(self._work)):
            time.sleep(WATCH_SECONDS)
            try:
                ray.get(mailbox.answer.remote(), timeout=WATCH_SECONDS)
                silence.end()
            except ActorDiedError:
                ended = ended or Silence()
            except RayError:  # it does not answer now
                pass
        with contextlib.suppress(RayError):  # only the main thread could leave regularly, and it may hang in its work
            ray.kill(ray.get_runtime_context().current_actor)
        time.sleep(WATCH_SECONDS)
        os._exit(1)


def clear(modules: dict[str, Any]) -> int:
    """Free the memory that the last function left in the process and on the GPU.

    Args:
        modules: The modules that the process has imported (`sys.modules`).

    Returns:
        Bytes that are still allocated on the GPU.

    Raises:
        RuntimeError: An error has broken the GPU's context, so that every later GPU call in this process would fail.
    """
    gc.collect()  # a model and its gradients form reference cycles
    if "torch._dynamo" in modules:
        # Compiled code keeps its model alive. After eight models of one class, torch would stop compiling without a
        # message.
        modules["torch"].compiler.reset()
    cuda = modules["torch"].cuda if "torch" in modules else None
    if cuda is None or not cuda.is_initialized():
        return 0
    cards = [card for card in range(cuda.device_count()) if cuda.memory_reserved(card)] or [cuda.current_device()]
    for card in cards:
        cuda.synchronize(card)  # raises errors of the last function's kernels that no call has reported yet
        cuda.reset_peak_memory_stats(card)
    cuda.empty_cache()
    return max(int(cuda.memory_allocated(card)) for card in cards)
