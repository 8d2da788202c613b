"""Judge facts about a card and its machine: the first part of an examination, which takes seconds."""

from __future__ import annotations

import dataclasses
import functools
import math
import re

from moedisco_ray.core.cards import BF16_CAPABILITY, LEAST_DRIVER, find_card
from moedisco_ray.core.records.measurements import Check
from moedisco_ray.execution.doctor.facts import CardFacts, MachineFacts

LEAST_SHARED = 512 * 2**20
"""Free memory in /dev/shm below which NCCL and loaders of data may fail (bytes); Docker's default is 64 MiB."""
LARGEST_SKEW = 5.0
"""Difference of clocks from which on times in logs, leases and bills are misleading (s)."""
_REFUSED_SKEW = 15 * 60.0
"""Difference of clocks from which on object stores refuse signed requests (s)."""
_BROKEN_XIDS = frozenset({48, 62, 64, 74, 79, 92, 94, 95, 119, 120})
"""Codes of errors of the hardware or its firmware, from NVIDIA's catalogue of Xid errors; others may be a program's."""
_GIB = 2**30

_ok = functools.partial(Check, part="system", state="ok")
_warning = functools.partial(Check, part="system", state="warning")
_failed = functools.partial(Check, part="system", state="failed")
_skipped = functools.partial(Check, part="system", state="skipped")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a configuration expects of a slot.

    Attributes:
        path: Dotted path of the pool's settings, such as `pools.low_memory`; empty without a configuration.
        memory_gb: Memory of a worker in the configuration (GiB).
        needed_gb: Memory that the largest training on the slot needs, by the plan (GiB); None if that is not known.
        card: Name of the card in the configuration; None: it names none.
        fp32: Whether all trainings compute in fp32, so that bf16 is not needed.
        compiles: Whether a training compiles its layers.
    """

    path: str = ""
    memory_gb: float | None = None
    needed_gb: float | None = None
    card: str | None = None
    fp32: bool = False
    compiles: bool = False


def card_checks(facts: CardFacts, wanted: Wanted) -> list[Check]:
    """Judge a card that torch can use."""
    return [
        _card(facts, wanted),
        _driver(facts),
        _capability(facts),
        _bf16(facts, wanted),
        _free_memory(facts, wanted),
        _others(facts),
        _memory_errors(facts),
        _xids(facts),
    ]


def machine_checks(facts: MachineFacts, wanted: Wanted, *, gpu: bool) -> list[Check]:
    """Judge a machine.

    Args:
        facts: What is known of it.
        wanted: What the configuration expects.
        gpu: Whether the slot has a card.
    """
    return [*([_shared_memory(facts), _locked_memory(facts)] if gpu else []), _compiler(facts, wanted)]


def clock_check(skew: float, uncertainty: float) -> Check:
    """Judge a machine's clock.

    Args:
        skew: Seconds by which it is ahead of this machine's.
        uncertainty: Half of the time that the question took (s).
    """
    found = f"{skew:+.1f} s from the clock here (+- {uncertainty:.1f} s)"
    off = abs(skew) - uncertainty
    if off <= LARGEST_SKEW:
        return _ok(name="clock", found=found)
    make = _warning if off < _REFUSED_SKEW else _failed
    return make(name="clock", found=found, remedy="start a time service there, such as chrony")


def _card(facts: CardFacts, wanted: Wanted) -> Check:
    found = f"{facts.name}, {facts.memory / _GIB:.1f} GiB"
    known = find_card(facts.name)
    if wanted.card is None or (known is not None and known.name == wanted.card):
        return _ok(name="card", found=found)
    name = None if known is None else known.name
    remedy = f"leave {wanted.path}.card out" if name is None else f"set {wanted.path}.card to {name!r}"
    return _warning(
        name="card",
        found=f"{found}, and the configuration says {wanted.card}",
        remedy=f"{remedy}: memory, speed and precision follow from it",
    )


def _driver(facts: CardFacts) -> Check:
    if facts.driver is None:
        return _skipped(name="driver", found="nvidia-smi does not list the card")
    found = f"{facts.driver}, torch {facts.torch} for CUDA {facts.cuda}"
    branch, cuda = (re.match(r"\d+", text or "") for text in (facts.driver, facts.cuda))
    least = LEAST_DRIVER.get(int(cuda[0])) if cuda else None
    if least is None or branch is None or int(branch[0]) >= least:
        return _ok(name="driver", found=found)
    return _failed(name="driver", found=found, remedy=f"install driver {least} or later, or torch for an older CUDA")


def _capability(facts: CardFacts) -> Check:
    major, minor = facts.capability
    found = f"{major}.{minor}"
    built = [
        (kind, int(number[:-1]), int(number[-1]))
        for kind, number in re.findall(r"\b(sm|compute)_(\d{2,})[af]?\b", " ".join(facts.architectures))
    ]
    binary = any(kind == "sm" and m == major and n <= minor for kind, m, n in built)
    portable = any(kind == "compute" and (m, n) <= (major, minor) for kind, m, n in built)
    if binary or portable or not built:
        return _ok(name="capability", found=found)
    return _failed(
        name="capability",
        found=f"{found}, and torch has kernels for {', '.join(facts.architectures)} only",
        remedy="install a torch build that lists it, or use another card",
    )


def _bf16(facts: CardFacts, wanted: Wanted) -> Check:
    if facts.capability >= BF16_CAPABILITY:
        return _ok(name="bf16", found="yes")
    if wanted.fp32:
        return _ok(name="bf16", found="no, and trainings here compute in fp32")
    named = f"name the card in {wanted.path}.card" if wanted.path else "name the card of the pool"
    return _warning(name="bf16", found="no", remedy=f"{named}, so that `precision: auto` means fp32; it is slower")


def _free_memory(facts: CardFacts, wanted: Wanted) -> Check:
    free = facts.free / _GIB
    found = f"{free:.1f} of {facts.memory / _GIB:.1f} GiB"
    if wanted.memory_gb is None or free >= wanted.memory_gb:
        return _ok(name="free memory", found=found)
    fits = wanted.needed_gb is not None and free >= wanted.needed_gb
    make = _warning if fits else _failed
    fitting = math.floor(10 * free) / 10
    return make(
        name="free memory",
        found=f"{found}, and the configuration says {wanted.memory_gb:g}",
        remedy=f"end what else uses the card, or set {wanted.path}.memory_gb={fitting:g}",
    )


def _others(facts: CardFacts) -> Check:
    name = "other processes"
    if facts.others is None:
        return _skipped(name=name, found="nvidia-smi does not list the card")
    if not facts.others:
        return _ok(name=name, found="none")
    listed = ", ".join(f"process {process} with {memory} MiB" for process, memory in facts.others)
    return _warning(name=name, found=listed, remedy="end them: they take memory and time of the card")


def _memory_errors(facts: CardFacts) -> Check:
    if facts.memory_errors is None:
        return _skipped(name="memory errors", found="the card does not count them")
    if not facts.memory_errors:
        return _ok(name="memory errors", found="none")
    return _failed(
        name="memory errors",
        found=f"{facts.memory_errors} since the last reboot were not corrected",
        remedy="reset the card (nvidia-smi --gpu-reset), and replace it if they return",
    )


def _xids(facts: CardFacts) -> Check:
    if facts.xids is None:
        return _skipped(name="Xid errors", found="this user may not read the kernel's log")
    if not facts.xids:
        return _ok(name="Xid errors", found="none")
    codes = ", ".join(map(str, sorted(set(facts.xids))))
    broken = _BROKEN_XIDS.intersection(facts.xids)
    make = _failed if broken else _warning
    remedy = "reboot the machine, and replace the card if they return" if broken else "look them up in NVIDIA's list"
    return make(name="Xid errors", found=f"{len(facts.xids)} in the kernel's log: {codes}", remedy=remedy)


def _shared_memory(facts: MachineFacts) -> Check:
    name = "shared memory"
    if facts.shared_memory is None:
        return _warning(name=name, found="there is no /dev/shm", remedy="mount it: NCCL exchanges data there")
    found = f"{facts.shared_memory / _GIB:.1f} GiB free in /dev/shm"
    if facts.shared_memory >= LEAST_SHARED:
        return _ok(name=name, found=found)
    return _warning(
        name=name, found=found, remedy="give the container more, as with docker's --shm-size=8g or --ipc=host"
    )


def _locked_memory(facts: MachineFacts) -> Check:
    if facts.locked_memory is None:
        return _ok(name="memlock", found="no limit")
    found = f"{facts.locked_memory / _GIB:.2f} GiB"
    if not facts.infiniband:
        return _ok(name="memlock", found=f"{found}, without InfiniBand")
    return _warning(
        name="memlock", found=f"{found}, with InfiniBand", remedy="remove the limit (ulimit -l unlimited) for NCCL"
    )


def _compiler(facts: MachineFacts, wanted: Wanted) -> Check:
    if facts.compiler is not None:
        return _ok(name="compiler", found=facts.compiler)
    if not wanted.compiles:
        return _ok(name="compiler", found="none, and no training compiles")
    return _failed(
        name="compiler", found="none", remedy="install g++ there, or set compile: false in submodels and finetune"
    )
