"""What a run computes on Ray is what it computes in one process, on record since before the code was last rearranged.

In the chaos tier for their time, a minute each; test_run.py holds at every change that a run on Ray has the bits of one process.
"""

import pinned_runs
import pytest

from moedisco_ray.execution import pipeline

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.timeout(360)]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("family", pinned_runs.RUNS)
def test_a_run_on_ray_gives_the_results_on_record(tmp_path, family):
    pinned_runs.compare(family, pipeline.run(pinned_runs.config_of(family, tmp_path)))
