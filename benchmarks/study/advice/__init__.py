"""Recommends a training recipe from measured runs.

`measured` reads the runs and `fitting` fits a `loss_curve` to each recipe. `prediction` and `transfer` (on `common_ground`) choose
among the `candidates` by their `ranking`. `confidence` rates how certain the advice is; `advised` defines its form. `advise` is
the entry point.
"""

from benchmarks.study.advice.advise import advise
from benchmarks.study.advice.advised import Advice, Goal
from benchmarks.study.advice.measured import read_measurements

__all__ = ["Advice", "Goal", "advise", "read_measurements"]
