"""Facts about a card and its machine, from torch, `nvidia-smi` and the kernel. What cannot be asked is None."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import resource
import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

_SECONDS = 10.0
"""Longest time that a program of the system may take (s): `nvidia-smi` never answers next to some broken cards."""
_XID = re.compile(r"NVRM: Xid \(PCI:(?P<bus>[0-9a-fA-F:.]+)\): (?P<code>\d+)")
_CARD_FIELDS = ("index", "uuid", "name", "driver_version", "pci.bus_id")
_MEMORY_ERRORS = "ecc.errors.uncorrected.volatile.total"
_INFINIBAND = Path("/sys/class/infiniband")
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the kernel's own


@dataclasses.dataclass(frozen=True)
class SmiCard:
    """A card as `nvidia-smi` describes it.

    Attributes:
        index: Number of the card on its machine.
        uuid: Id of the card, which starts with `GPU-`.
        name: Name of the product.
        driver: Version of the driver.
        bus: PCI address.
    """

    index: str
    uuid: str
    name: str
    driver: str
    bus: str


@dataclasses.dataclass(frozen=True)
class CardFacts:
    """What is known of one card.

    Attributes:
        name: Name of the product.
        driver: Version of the driver.
        cuda: Version of CUDA with which torch was built.
        torch: Version of torch.
        capability: Compute capability.
        architectures: What torch has kernels for, such as `sm_90` and `compute_90`.
        memory: Memory that torch reports (bytes).
        free: Memory that no process holds (bytes).
        others: Process and memory (MiB) of each other process that computes on the card.
        memory_errors: Errors of the memory since the last reboot that were not corrected.
        xids: Codes of errors that the kernel's log has of this card.
    """

    name: str
    driver: str | None
    cuda: str | None
    torch: str
    capability: tuple[int, int]
    architectures: tuple[str, ...]
    memory: int
    free: int
    others: tuple[tuple[str, str], ...] | None = None
    memory_errors: int | None = None
    xids: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class MachineFacts:
    """What is known of a machine.

    Attributes:
        shared_memory: Free bytes in `/dev/shm`; None if there is no such folder.
        locked_memory: Memory that a process may lock (bytes); None: no limit.
        infiniband: Whether there is an InfiniBand adapter.
        compiler: Path of the C++ compiler.
        available: Memory that is available (bytes).
    """

    shared_memory: int | None
    locked_memory: int | None
    infiniband: bool
    compiler: str | None
    available: int


def machine_facts() -> MachineFacts:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return MachineFacts(
        shared_memory=shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else None,
        locked_memory=None if limit == resource.RLIM_INFINITY else limit,
        infiniband=_INFINIBAND.is_dir() and any(_INFINIBAND.iterdir()),
        compiler=shutil.which("g++") or shutil.which("c++") or shutil.which("clang++"),
        available=psutil.virtual_memory().available,
    )


def card_facts(device: str) -> CardFacts:
    """Facts about a card that torch can use."""
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    card = smi_card(str(getattr(properties, "uuid", "")))
    return CardFacts(
        name=properties.name,
        driver=None if card is None else card.driver,
        cuda=torch.version.cuda,
        torch=torch.__version__,
        capability=torch.cuda.get_device_capability(device),
        architectures=tuple(torch.cuda.get_arch_list()),
        memory=total,
        free=free,
        others=None if card is None else other_processes(card),
        memory_errors=None if card is None else memory_errors(card),
        xids=None if card is None else xids(card),
    )


def smi_card(uuid: str) -> SmiCard | None:
    """The card with this id; None if `nvidia-smi` does not list it."""
    rows = _smi(f"--query-gpu={','.join(_CARD_FIELDS)}")
    cards = [SmiCard(*row) for row in rows or () if len(row) == len(_CARD_FIELDS)]
    return next((card for card in cards if uuid and card.uuid.lower().endswith(uuid.lower())), None)


def other_processes(card: SmiCard) -> tuple[tuple[str, str], ...] | None:
    """Processes that compute on a card, and their memory (MiB), without this process and its children."""
    rows = _smi("--query-compute-apps=gpu_uuid,pid,used_memory")
    own = {str(os.getpid()), *(str(child.pid) for child in psutil.Process().children(recursive=True))}
    return (
        None if rows is None else tuple((row[1], row[2]) for row in rows if row[0] == card.uuid and row[1] not in own)
    )


def memory_errors(card: SmiCard) -> int | None:
    """Errors of a card's memory that were not corrected; None if the card does not count them."""
    rows = _smi(f"--query-gpu={_MEMORY_ERRORS}", f"--id={card.index}")
    return int(rows[0][0]) if rows and rows[0][0].isdecimal() else None


def xids(card: SmiCard) -> tuple[int, ...] | None:
    """Codes of a card's errors in the kernel's log; None if this user may not read the log."""
    log = _output(["dmesg"])
    if log is None:
        return None
    found = _XID.finditer(log)
    return tuple(int(each["code"]) for each in found if _same_bus(each["bus"], card.bus))


def _same_bus(in_log: str, in_smi: str) -> bool:
    """Whether two notations are one PCI address: `0000:3b:00` in the log, and `00000000:3B:00.0`."""
    return in_smi.lower().rpartition(".")[0].endswith(in_log.lower().partition(".")[0])


def node_name(address: str | None = None) -> str:
    """Name of this machine, and its address in the Ray cluster if it is in one."""
    return socket.gethostname() if address is None else f"{socket.gethostname()} ({address})"


def _smi(*query: str) -> list[list[str]] | None:
    """Rows of an answer of `nvidia-smi`; None if it does not answer."""
    answer = _output(["nvidia-smi", *query, "--format=csv,noheader,nounits"])
    if answer is None:
        return None
    return [re.split(r"\s*,\s*", line.strip()) for line in answer.splitlines() if line.strip()]


def _output(command: Sequence[str]) -> str | None:
    program = shutil.which(command[0])
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        if program is not None:
            done = subprocess.run(  # noqa: S603 - a program of the system, with arguments of ours
                [program, *command[1:]], check=True, capture_output=True, text=True, timeout=_SECONDS, errors="replace"
            )
            return done.stdout
    return None
