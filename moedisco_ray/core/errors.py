"""Every error this package raises on purpose.

MoeDiscoError
├── UserError            something the user can correct: one line, exit code 2
│   ├── ConfigError      a setting is missing, unknown, or contradicts another
│   ├── CorpusError      the text is empty, binary, unreadable or too small
│   ├── CheckpointError  a model directory is of another family, or holds an unknown tensor
│   ├── PoolError        no node offers what a pool asks for
│   │   └── CardError    torch cannot compute on a worker's GPU
│   └── RunDirError      the output holds another run, or cannot be written
│       └── DiskFullError    the disk is full
├── RunError             the run itself failed: exit code 1
│   ├── StorageError     the checkpoint storage did not respond for minutes, or a checkpoint is damaged
│   ├── DamagedError     a file of a finished stage is not what the stage wrote
│   └── TrainingError    a training failed too often, or diverged
│       └── DivergedError    training fails because of its state or data, on any machine
│           └── NotFiniteError   a loss or gradient that is not finite
└── RunStopped           a user, a budget or a newer run stopped the run: exit code 3
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

REPAIR = "run the same command again with --repair to make it again; `moedisco verify` lists all damaged files"
"""Remedy for a damaged file of a run."""

_HUB_SCHEME = re.compile(r"(?:[^\w+.-])?hf")
_WITHOUT_PASSWORD = re.compile(r":/+[^:@\s]*(?:[@\s]|$)")
_OPTION = re.compile(r"([?&;](?!(?:region|anonymous|scheme)=)[^=?&;\s]+=)[^&;'\"]+")


class MoeDiscoError(Exception):
    """Base class of all errors of this package."""


def masked(text: str) -> str:
    """The text with possible credentials in a URI (user, password, option values) replaced by `***`."""
    start, end = text.find(":/"), text.rfind("@")
    # In a URI of the hub, what follows `@` is a revision.
    while start >= 0 and _HUB_SCHEME.fullmatch(text, max(0, start - 3), start) and _WITHOUT_PASSWORD.match(text, start):
        start = text.find(":/", start + 1)
    if 0 <= start < end:
        scheme = start + (3 if text.startswith("://", start) else 2)
        text = f"{text[:scheme]}***{text[end:]}"
    return _OPTION.sub(r"\1***", text)


class UserError(MoeDiscoError, ValueError):
    """A mistake that the user can correct, in one line: field, value, remedy.

    Args:
        field: Place of the mistake: a dotted configuration path, a file or a command-line option.
        value: The value found there, with credentials masked.
        remedy: What to do.

    Attributes:
        others: Further mistakes that were found together with this one.
    """

    others: tuple[UserError, ...] = ()

    def __init__(self, field: str, value: Any, remedy: str) -> None:
        # All three go to Exception.args, so that the error survives pickling between Ray processes.
        value = masked(value) if isinstance(value, str) else value
        super().__init__(field, value, remedy)
        self.field = field
        self.value = value
        self.remedy = remedy

    def __str__(self) -> str:
        parts = [self.field, None if self.value is None else masked(repr(self.value)), self.remedy]
        return ": ".join(part for part in parts if part is not None).replace("\n", " ")


def raise_together(mistakes: Iterable[UserError]) -> None:
    """Raise the first mistake with the others; do nothing if there is none."""
    found = list(mistakes)
    if found:
        found[0].others += tuple(found[1:])
        raise found[0]


class ConfigError(UserError):
    """A setting is missing, unknown, out of bounds, or contradicts another."""


class CorpusError(UserError):
    """The text is empty, binary, unreadable, or too small for what is asked."""


class CheckpointError(UserError):
    """A model directory is of another family, incomplete, or holds a tensor that no rule claims."""


class PoolError(UserError):
    """No node of the Ray cluster offers what a pool asks for."""


class CardError(PoolError):
    """torch cannot compute on the GPU of a worker.

    Args:
        field: Setting that asks for the GPU.
        value: Number of GPUs that it asks for.
        remedy: What is wrong with the GPU, and what to do.
        node_id: Id of the worker's node in the Ray cluster.
    """

    def __init__(self, field: str, value: int, remedy: str, node_id: str) -> None:
        super().__init__(field, value, remedy)
        self.args = (field, value, remedy, node_id)
        self.node_id = node_id


class RunDirError(UserError):
    """The output directory holds another run, or cannot be written."""


class DiskFullError(RunDirError):
    """The disk, or the quota on it, is full."""


class RunError(MoeDiscoError, RuntimeError):
    """The run failed for a reason other than the user's settings."""


class StorageError(RunError):
    """The checkpoint storage does not respond, or a checkpoint is damaged; another attempt may succeed."""


class DamagedError(RunError):
    """A file of a finished stage, or another file of a run, is not what was written.

    Args:
        file: Name of the file, relative to the run or model directory.
        stage: Stage that wrote the file; empty if no stage did.
        location: Directory or URI of the run; empty if unknown.
        remedy: What to do.
    """

    def __init__(self, file: str, stage: str = "", location: str = "", remedy: str = REPAIR) -> None:
        # All go to Exception.args, so that the error survives pickling between Ray processes.
        super().__init__(file, stage, location, remedy)
        self.file, self.stage, self.remedy = file, stage, remedy
        self.location = masked(location)

    def __str__(self) -> str:
        place = f" in {self.location}" if self.location else ""
        writer = f"stage {self.stage}" if self.stage else "the run"
        return f"{self.file}{place} is damaged: it is not what {writer} wrote; {self.remedy}"


class TrainingError(RunError):
    """A training failed too often or diverged, so that its stage cannot finish."""


class DivergedError(TrainingError):
    """A training fails on any machine, because of its state or data."""


class NotFiniteError(DivergedError):
    """A loss or a gradient is not finite.

    Args:
        message: Message for users.
        step: Step with that loss or gradient, counted from 1.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message, step)
        self.step = step

    def __str__(self) -> str:
        return str(self.args[0])


class RunStopped(MoeDiscoError):  # noqa: N818 - an end, not an error
    """The run was stopped from outside, after it saved its checkpoints.

    Args:
        reason: One word: `cancelled`, `budget`, `superseded`.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"stopped ({self.reason})"
