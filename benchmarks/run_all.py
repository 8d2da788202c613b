"""Measure everything again, then write RESULTS.md from the results."""

from __future__ import annotations

import subprocess
import sys

if __name__ == "__main__":
    modules = (
        "training_step", "kmeans", "ray_overhead", "service_load", "checkpoint_stall", "study.simulation", "makespan",
        "corpus_scale", "true_sizes", "document")
    for module in modules:
        subprocess.run([sys.executable, "-m", f"benchmarks.{module}"], check=True)
