"""Measure everything again, then write RESULTS.md from the results."""

from __future__ import annotations

import subprocess
import sys

from harness import ROOT

if __name__ == "__main__":
    scripts = (
        "submodel_step.py", "kmeans.py", "ray_overhead.py", "service_load.py", "checkpoint_stall.py", "simulator.py", "makespan.py",
        "document.py")
    for script in scripts:
        subprocess.run([sys.executable, str(ROOT / script)], check=True)
