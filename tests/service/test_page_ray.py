"""What the web page shows of Ray: the run's job in the dashboard."""

import pytest
from dashboard_standin import dashboard
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
