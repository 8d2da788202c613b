"""What a run computes on Ray is what it computes in one process, on record since before the code was last rearranged.

One of them runs at every change; the others are in the chaos tier for their time.
"""

import pinned_runs
import pytest

from moedisco_ray.execution import pipeline

pytestmark = [pytest.mark.ray, pytest.mark.timeout(360)]
EACH_TIME = "qwen3_moe"


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    "family",
    [pytest.param(family, marks=[] if family == EACH_TIME else [pytest.mark.chaos]) for family in pinned_runs.RUNS],
)
def test_a_run_on_ray_gives_the_results_on_record(tmp_path, family):
    pinned_runs.compare(family, pinned_runs.results(pipeline.run(pinned_runs.config_of(family, tmp_path))))
