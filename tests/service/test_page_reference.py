"""The API reference, drawn in a browser under the service's security policy."""

import pytest
from page_server import site as serve
from playwright.sync_api import expect

pytestmark = pytest.mark.browser


@pytest.mark.slow
def test_the_reference_shows_every_operation_without_asking_any_other_host(browser, tmp_path):
    with serve(tmp_path) as site, browser.new_context() as context:
        page, faults, asked = context.new_page(), [], set()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
        page.on("request", lambda request: asked.add(request.url.partition("?")[0]))
        page.goto(f"{site.url}/#token={site.service.plain['ann']}")
        page.get_by_role("link", name="API").click()
        expect(page.get_by_text("MoEDisCo control service").first).to_be_visible(timeout=60_000)  # 1.7 MB of script
        document = site.service.anonymous.get("/openapi.json").json()
        operations = sum(len(methods) for methods in document["paths"].values())
        expect(page.locator(".opblock")).to_have_count(operations)
        page.locator("#operations-runs-list_runs").click()
        expect(page.get_by_text("List runs in any order").first).to_be_visible()
        assert not faults
        assert all(url.startswith((site.url, "data:")) for url in asked)
