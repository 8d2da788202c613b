"""What the web page shows of Ray: the run's job in the dashboard, and what Ray Train says of its trainings."""

import pytest
from dashboard_standin import dashboard, training
from page_runs import begin
from page_server import site as serve
from playwright.sync_api import expect

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
    ray.answers("/static/js/main.js", b"""
        document.getElementById("root").textContent = location.hash;
        const later = (name) => (answer) => document.body.append(` ${name} ${answer.status ?? answer.name};`);
        const tried = (name, path) => fetch(path).then(later(name), later(name));
        tried("jobs", "./api/jobs/").then(() => tried("identity", "/v1/identity"));
        document.body.append(` window ${open("/")};`);""", Content_Type="text/javascript")
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


def test_a_runs_trainings_show_their_state_attempts_and_workers(browser, site, ray):
    run = begin(site)
    ray.answers("/api/train/v2/runs/v1", {"train_runs": [
        training("demo-submodel-0-00ffee11", f"{run}-1", status="FINISHED", end_time_ns=95 * 10**9),
        training("demo-submodel-1-00ffee12", f"{run}-1", 2)]})
    with browser.new_context() as context:
        page = opened(context, site, "ann", run)
        rows = page.get_by_role("region", name="Ray Train").get_by_role("row")
        expect(rows.nth(1)).to_contain_text("submodel-0finished1210.0.0.71 min 34 s")
        expect(rows.nth(2)).to_contain_text("submodel-1running12 of 2 alive10.0.0.7")
