"""What an examination says about a card and its machine, and what it asks `nvidia-smi`, by a made-up one."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from moedisco_ray.core.records.measurements import Check
from moedisco_ray.execution.doctor import facts
from moedisco_ray.execution.doctor.facts import CardFacts, MachineFacts, SmiCard
from moedisco_ray.execution.doctor.system import Wanted, card_checks, clock_check, machine_checks

GIB = 2**30
L4 = CardFacts(
    name="NVIDIA L4",
    driver="580.65.06",
    cuda="13.0",
    torch="2.13.0",
    capability=(8, 9),
    architectures=("sm_75", "sm_80", "sm_86", "sm_90", "compute_120"),
    memory=22 * GIB,
    free=int(21.5 * GIB),
    others=(),
    memory_errors=0,
    xids=(),
)
MACHINE = MachineFacts(
    shared_memory=8 * GIB, locked_memory=8 << 20, infiniband=False, compiler="/usr/bin/g++", available=GIB
)
WANTED = Wanted(path="pools.low_memory", memory_gb=20, needed_gb=14.2, card="L4", compiles=True)
SMI = """#!/bin/sh
case "$*" in
    *query-gpu=index*) echo "0, GPU-aaaa-1, NVIDIA L4, 580.65.06, 00000000:00:03.0"
                       echo "1, GPU-bbbb-2, NVIDIA T4, 535.104.05, 00000000:00:04.0" ;;
    *query-compute-apps*) echo "GPU-aaaa-1, 4242, 812"; echo "GPU-bbbb-2, 4243, 99"; echo "GPU-aaaa-1, {own}, 5" ;;
    *ecc*--id=0*) echo "[N/A]" ;;
    *ecc*--id=1*) echo "3" ;;
    *) exit 9 ;;
esac
"""
DMESG = """#!/bin/sh
echo "[ 17.1] NVRM: Xid (PCI:0000:00:04): 79, pid=1, GPU has fallen off the bus."
echo "[ 18.1] NVRM: Xid (PCI:0000:00:05): 13, pid=1"
"""


def changed(checks: list[Check]) -> dict[str, tuple[str, str]]:
    """What is not in order: state and text of each check, by name."""
    return {each.name: (each.state, f"{each.found}; {each.remedy}") for each in checks if each.state != "ok"}


def test_a_healthy_card_on_a_healthy_machine_passes_every_check() -> None:
    checks = [*card_checks(L4, WANTED), *machine_checks(MACHINE, WANTED, gpu=True)]
    assert changed(checks) == {}
    assert [each.name for each in checks] == [
        "card",
        "driver",
        "capability",
        "bf16",
        "free memory",
        "other processes",
        "memory errors",
        "Xid errors",
        "shared memory",
        "memlock",
        "compiler",
    ]


@pytest.mark.parametrize(
    ("found", "name", "state", "says"),
    [
        ({"driver": "535.104.05"}, "driver", "failed", "535.104.05, torch 2.13.0 for CUDA 13.0; install driver 580 or"),
        ({"driver": None}, "driver", "skipped", "nvidia-smi does not list the card"),
        ({"architectures": ("sm_90", "sm_100a")}, "capability", "failed", "torch has kernels for sm_90, sm_100a only"),
        ({"free": 15 * GIB}, "free memory", "warning", "15.0 of 22.0 GiB, and the configuration says 20; end what"),
        ({"free": 14 * GIB}, "free memory", "failed", "or set pools.low_memory.memory_gb=14"),
        ({"others": (("77", "812"),)}, "other processes", "warning", "process 77 with 812 MiB; end them"),
        ({"memory_errors": 2}, "memory errors", "failed", "reset the card"),
        ({"memory_errors": None}, "memory errors", "skipped", "does not count them"),
        ({"xids": (13, 13)}, "Xid errors", "warning", "2 in the kernel's log: 13; look them up"),
        ({"xids": (79, 13)}, "Xid errors", "failed", "13, 79; reboot the machine"),
        ({"xids": None}, "Xid errors", "skipped", "may not read"),
        ({"name": "NVIDIA A10G"}, "card", "warning", "the configuration says L4; set pools.low_memory.card to 'A10G'"),
        ({"name": "Tesla M60"}, "card", "warning", "leave pools.low_memory.card out"),
    ],
)
def test_what_is_wrong_with_a_card_is_said_with_a_remedy(
    found: dict[str, Any], name: str, state: str, says: str
) -> None:
    wrong = changed(card_checks(dataclasses.replace(L4, **found), WANTED))
    assert wrong.keys() == {name}
    assert wrong[name][0] == state
    assert says in wrong[name][1]


def test_a_card_without_bf16_is_named_unless_trainings_compute_in_fp32() -> None:
    old = dataclasses.replace(L4, capability=(7, 5))
    assert changed(card_checks(old, WANTED))["bf16"][0] == "warning"
    assert "bf16" not in changed(card_checks(old, dataclasses.replace(WANTED, fp32=True)))


def test_a_card_runs_what_was_built_for_an_older_one_of_its_generation_or_in_portable_code() -> None:
    for built in (("sm_80",), ("compute_75",), ()):
        assert changed(card_checks(dataclasses.replace(L4, architectures=built), WANTED)) == {}


@pytest.mark.parametrize(
    ("found", "name", "state"),
    [
        ({"shared_memory": 64 << 20}, "shared memory", "warning"),
        ({"shared_memory": None}, "shared memory", "warning"),
        ({"infiniband": True}, "memlock", "warning"),
        ({"compiler": None}, "compiler", "failed"),
    ],
)
def test_what_is_wrong_with_a_machine_is_said(found: dict[str, Any], name: str, state: str) -> None:
    wrong = changed(machine_checks(dataclasses.replace(MACHINE, **found), WANTED, gpu=True))
    assert {each: text[0] for each, text in wrong.items()} == {name: state}


def test_a_machine_without_a_card_needs_a_compiler_only_to_compile() -> None:
    bare = dataclasses.replace(MACHINE, shared_memory=None, infiniband=True, compiler=None)
    assert changed(machine_checks(bare, dataclasses.replace(WANTED, compiles=False), gpu=False)) == {}


@pytest.mark.parametrize(
    ("skew", "uncertainty", "state"),
    [(4.0, 0.0, "ok"), (-6.0, 0.5, "warning"), (6.0, 2.0, "ok"), (-1000.0, 1.0, "failed")],
)
def test_a_clock_is_judged_by_what_the_delay_of_the_question_leaves(
    skew: float, uncertainty: float, state: str
) -> None:
    assert clock_check(skew, uncertainty).state == state


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that comes first on the path, with `nvidia-smi` and `dmesg` of a machine with two cards."""
    for name, text in (("nvidia-smi", SMI.format(own=os.getpid())), ("dmesg", DMESG)):
        program = tmp_path / name
        program.write_text(text)
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path


@pytest.mark.usefixtures("programs")
def test_a_card_is_found_by_its_id_and_has_its_own_errors_and_processes() -> None:
    first, second = facts.smi_card("aaaa-1"), facts.smi_card("BBBB-2")
    assert first == SmiCard("0", "GPU-aaaa-1", "NVIDIA L4", "580.65.06", "00000000:00:03.0")
    assert second is not None
    assert facts.other_processes(first) == (("4242", "812"),)  # without this process
    assert (facts.memory_errors(first), facts.memory_errors(second)) == (None, 3)
    assert (facts.xids(first), facts.xids(second)) == ((), (79,))
    assert facts.smi_card("") is None


def test_without_the_programs_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    card = SmiCard("0", "GPU-aaaa-1", "NVIDIA L4", "580", "00000000:00:03.0")
    found = (facts.smi_card("aaaa-1"), facts.other_processes(card), facts.memory_errors(card), facts.xids(card))
    assert found == (None, None, None, None)


def test_a_program_that_never_answers_is_not_waited_for(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (programs / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(facts, "_SECONDS", 0.2)
    assert facts.smi_card("aaaa-1") is None
