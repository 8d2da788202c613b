"""What the web page shows of Ray: the run's job in the dashboard, and its trainings with attempts and workers."""

import pytest
from dashboard_standin import dashboard
from page_runs import begin
from page_server import site as serve
from playwright.sync_api import expect

from moedisco_ray.core.records.events import Event

pytestmark = pytest.mark.browser


@pytest.fixture
def ray():
    with dashboard() as standin:
        yield standin


@pytest.fixture
def site(tmp_path, ray):
    with serve(tmp_path, dashboard_url=ray.url) as served:
        yield served


def opened(context, site, who, run):
    page = context.new_page()
    page.goto(f"{site.url}/#token={site.service.plain[who]}")
    expect(page.get_by_role("navigation")).to_be_visible()
    page.goto(f"{site.url}/#/runs/{run}")
    expect(page.get_by_role("heading", level=1)).to_contain_text("demo")
    return page


def test_one_click_shows_an_administrator_the_runs_job_in_the_dashboard(browser, site, ray):
    run = begin(site)
    ray.answers(
        "/static/js/main.js",
        b"""
        document.getElementById("root").textContent = location.hash;
        const later = (name) => (answer) => document.body.append(` ${name} ${answer.status ?? answer.name};`);
        const tried = (name, path) => fetch(path).then(later(name), later(name));
        tried("jobs", "./api/jobs/").then(() => tried("identity", "/v1/identity"));
        document.body.append(` window ${open("/")};`);""",
        Content_Type="text/javascript",
    )
    with browser.new_context() as context:
        page = opened(context, site, "admin", run)
        with context.expect_page() as clicked:
            page.get_by_role("link", name="Ray job").click()
        shown = clicked.value
        expect(shown.locator("#root")).to_have_text(f"#/jobs/{run}-1")
        # The dashboard's scripts reach Ray, and nothing of the service.
        expect(shown.locator("body")).to_contain_text("jobs 200; identity TypeError;")
        expect(shown.locator("body")).to_contain_text("window null;")
    assert "/api/jobs/" in ray.paths()


def test_a_tenant_sees_no_link_to_ray(browser, site):
    run = begin(site)
    with browser.new_context() as context:
        page = opened(context, site, "ann", run)
        expect(page.get_by_role("link", name="Retry with changes")).to_be_visible()
        expect(page.get_by_role("link", name="Ray job")).to_have_count(0)
        page.goto(f"{site.url}/#/pools")
        expect(page.get_by_role("heading", name="Pools")).to_be_visible()
        expect(page.get_by_role("link", name="Ray dashboard")).to_have_count(0)


def test_a_runs_trainings_show_their_state_attempts_and_workers(browser, site):
    run = begin(site)
    site.service.report(
        run,
        started("submodel-0", workers=1),
        Event("unit_finished", "submodels", "submodel-0", {"steps": 400, "tokens": 400, "loss": 4.0}),
        started("submodel-1", workers=1),
        Event(
            "worker_restarted", "submodels", "submodel-1", {"kind": "died", "step": 3, "reason": "its process ended"}
        ),
        started("submodel-2", workers=1),
        Event(
            "worker_restarted",
            "submodels",
            "submodel-2",
            {"kind": "preempted", "step": 3, "reason": "its node is gone"},
        ),
        started("submodel-2", workers=2),
    )
    with browser.new_context() as context:
        page = opened(context, site, "ann", run)
        rows = page.get_by_role("region", name="Trainings").get_by_role("row")
        expect(rows).to_have_count(4)
        for place, (unit, state, attempts, workers) in enumerate(
            [
                ("submodel-0", "done", "1", "1 on 10.0.0.7"),
                ("submodel-1", "restarting", "2", "1 on 10.0.0.7"),
                ("submodel-2", "running", "2", "2 on 10.0.0.7"),
            ],
            start=1,
        ):
            expect(rows.nth(place).get_by_role("rowheader")).to_have_text(unit)
            expect(rows.nth(place).get_by_role("cell").nth(0)).to_have_text(state)
            expect(rows.nth(place).get_by_role("cell").nth(6)).to_have_text(attempts)
            expect(rows.nth(place).get_by_role("cell").nth(7)).to_have_text(workers)


def started(unit, workers):
    return Event(
        "unit_started",
        "submodels",
        unit,
        {"steps": 400, "tokens": 400, "workers": workers, "node": "10.0.0.7", "node_id": "n", "pid": 7},
    )
