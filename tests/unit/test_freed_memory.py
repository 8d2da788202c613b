"""Memory that a CPU training frees is used again, and goes back to the operating system at the end."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from moedisco_ray.models.freed_memory import reused_memory

PROGRAM = """
import os, resource, sys
import torch
from moedisco_ray.models.freed_memory import reused_memory

MEGABYTES = 64

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        torch.zeros(MEGABYTES * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
ordinary = faults(4)
before = resident()
with reused_memory("cpu"):
    faults(1)
    reused, kept = faults(4), resident() - before
print(ordinary, reused, kept, resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library has no mallopt")
def test_freed_memory_is_used_again_and_returned_at_the_end() -> None:
    """In a process of its own, because the options hold for the whole process."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=100, check=True)
    ordinary, reused, kept, left = map(float, run.stdout.split())
    pages = 4 * 64 * 2**20 / 4096
    assert ordinary > pages / 10  # with huge pages there are fewer faults
    assert reused < ordinary / 20
    assert kept > 60
    assert left < 8


def test_a_training_on_a_gpu_leaves_the_allocator_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def called(name: None) -> object:
        class Library:
            def __getattr__(self, option: str) -> object:
                raise AssertionError(option)

        return Library()

    monkeypatch.setattr("ctypes.CDLL", called)
    with reused_memory(str(torch.device("cuda", 0))):
        pass
