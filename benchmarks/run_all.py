"""Measure everything again, then write RESULTS.md from the results.

Except for `corpus_engines` with an old commit, which compares two commits.
"""

from __future__ import annotations

import shlex
import subprocess
import sys

COMMANDS = (
    "training_step",
    "ray_overhead",
    "seats",
    "seats --jobs 256 --slots 64 --steps 100 --pace 2 --rounds 1 --arms seats --no-slope --result seats_256",
    "service_load",
    "service_tabs",
    "checkpoint_stall",
    "verification",
    "study.simulation",
    "makespan",
    "corpus_scale",
    "corpus_engines --blocks 1 7 200 --megabytes 1000 --documents 5000000 --rounds 1",
    "true_sizes",
    "expert_offload",
    "within_documents --tokens 300000",
    "fake_memory",
    "streamed_timeline",
    "streamed_host",
    "streamed_cards",
    "members --work runs/members",
    "document",
)

if __name__ == "__main__":
    for command in COMMANDS:
        module, *arguments = shlex.split(command)
        subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *arguments], check=True)
