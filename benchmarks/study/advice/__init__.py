"""By which recipe to train, from runs that were measured.

`measured` reads the runs, `study` fits a `loss_curve` to each recipe, `prediction` and `transfer` (on `common_ground`) choose among
the `candidates` by their `ranking`, and `confidence` says how sure that is, in the words of `advised`. `advise` is all of it.
"""

from benchmarks.study.advice.advise import advise
from benchmarks.study.advice.advised import Advice, Goal
from benchmarks.study.advice.measured import read_measurements

__all__ = ["Advice", "Goal", "advise", "read_measurements"]
