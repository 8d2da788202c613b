"""What a run computes on Ray is what it computes in one process, as on record since before code was rearranged."""

import pinned_runs
import pytest

from moedisco_ray.execution import pipeline

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(360)]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("family", pinned_runs.RUNS)
def test_a_run_on_ray_gives_the_results_on_record(tmp_path, family):
    pinned_runs.compare(family, pinned_runs.results(pipeline.run(pinned_runs.config_of(family, tmp_path))))
