"""A client generated from the service's own description by openapi-python-client, used against the service."""

import importlib
import subprocess
import sys

import pytest
from page_runs import finish
from page_server import site as serve

PACKAGE = "generated_moedisco_client"
CONFIG = """\
content_type_overrides:
  application/x-tar: application/octet-stream
  application/problem+json: application/json
  text/event-stream: text/plain
post_hooks: []
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("site")) as served:
        yield served


@pytest.fixture(scope="module")
def generated(site, tmp_path_factory):
    """Imports a module of the client."""
    home = tmp_path_factory.mktemp("generated")
    (home / "openapi.json").write_bytes(site.service.anonymous.get("/openapi.json").content)
    (home / "config.yaml").write_text(CONFIG)
    made = subprocess.run(
        [
            sys.executable,
            "-m",
            "openapi_python_client",
            "generate",
            "--path",
            home / "openapi.json",
            "--meta",
            "none",
            "--output-path",
            home / PACKAGE,
            "--config",
            home / "config.yaml",
            "--fail-on-warning",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stdout + made.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(home)
        yield lambda name: importlib.import_module(f"{PACKAGE}.{name}" if name else PACKAGE)
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            patch.delitem(sys.modules, name)


@pytest.fixture(scope="module")
def client(site, generated):
    with generated("").AuthenticatedClient(
        site.url, site.service.plain["ann"], raise_on_unexpected_status=True
    ) as made:
        yield made


@pytest.mark.slow
def test_runs_reports_and_pools_are_read_typed(site, generated, client):
    models = generated("models")
    run_id = finish(site)
    page = generated("api.runs.list_runs").sync(client=client)
    assert isinstance(page, models.RunPage)
    [run] = page.items
    assert isinstance(run, models.Run)
    assert (run.id, run.state, run.job_url) == (run_id, models.RunState.SUCCEEDED, None)
    assert isinstance(run.money, models.Money)

    report = generated("api.watching.get_report").sync(run_id, client=client)
    assert isinstance(report, models.RunReport)
    assert all(isinstance(stage, models.StageReport) for stage in report.stages)
    assert isinstance(report.bill, models.Bill)
    assert isinstance(report.curves["finetune"], models.Curve)
    assert report.stages[1].loss == pytest.approx(4.1)

    pools = generated("api.planning.list_pools").sync(client=client)
    assert isinstance(pools, models.PoolList)
    assert [type(pool) for pool in pools.items] == [models.PoolStatus] * 2
    assert isinstance(generated("api.watching.list_submodels").sync(run_id, client=client).items[0], models.Unit)


def test_a_run_is_submitted_and_a_problem_is_typed_too(generated, client):
    models = generated("models")
    body = models.RunRequest.from_dict({"config": {"name": "typed", "corpus": {"sources": [{"path": "embedded"}]}}})
    made = generated("api.runs.submit_run").sync(client=client, body=body)
    assert isinstance(made, models.RunDetail)
    assert made.name == "typed"
    problem = generated("api.runs.get_run").sync("absent", client=client)
    assert isinstance(problem, models.Problem)
    assert problem.status == 404
