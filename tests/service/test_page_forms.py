"""What the forms of the page send, and the time that a run's header shows."""

import time

import pytest
import run_example
from browser import browser
from page_editor import Editor
from page_runs import begin
from page_server import site as serve
from playwright.sync_api import expect
from s3_standin import s3_server
from sqlalchemy import update
from test_page import open_page, page, site, state_pill, stored

from moedisco_ray.core.records.events import Event
from service.database import tokens
from service.database.tables import RunRow
from service.domain.states import RunState

__all__ = ["browser", "open_page", "page", "site"]
pytestmark = pytest.mark.browser


def failed(site, **changes):
    run_id = begin(site, **changes)
    site.service.bring(run_id, RunState.FAILED)
    return run_id


def retry(page, run_id, edit):
    """Submit a retry with an edited configuration; returns the changes that were sent."""
    page.goto(f"{page.url.partition('#')[0]}#/runs/{run_id}/retry")
    editor = Editor(page).wait_for("name:")
    if (text := edit(editor.text)) != editor.text:
        editor.fill(text)
    button = page.get_by_role("button", name="Submit the retry")
    expect(button).to_be_enabled()
    with page.expect_request(f"**/v1/runs/{run_id}/retry") as asked:
        button.click()
    expect(state_pill(page)).to_have_text("queued")
    return asked.value.post_data_json["changes"]


@pytest.mark.slow
def test_a_budget_that_cannot_be_read_changes_nothing(site, page):
    run_id = begin(site)
    site.service.ann.patch(f"/v1/runs/{run_id}", json={"budget_dollars": 5})
    page.goto(f"/#/runs/{run_id}")
    sent = []
    page.on("request", lambda asked: sent.append(asked.post_data_json) if asked.method == "PATCH" else None)
    page.get_by_role("button", name="Change the budget").click()
    field = page.get_by_label("Budget, dollars")
    field.fill("")
    field.press_sequentially("1e")
    page.get_by_role("button", name="Save").click()
    field.press_sequentially("1")
    page.get_by_role("button", name="Save").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert sent == [{"budget_dollars": 10}]
    assert stored(site, run_id).budget_dollars == 10


@pytest.mark.slow
def test_tags_with_a_dot_are_changed_in_a_retry(site, page):
    run_id = failed(site, tags={"team.a": "x", "grant": "y"})
    site.service.ann.patch(f"/v1/runs/{run_id}", json={"tags": {"team.a": "x", "grant": "z"}})
    changes = retry(page, run_id, lambda text: text.replace("team.a: x", "team.a: w"))
    assert changes == {"tags": {"team.a": "w", "grant": "z"}}
    assert stored(site, page.url.rsplit("/", 1)[1]).tags == {"team.a": "w", "grant": "z"}


@pytest.mark.slow
def test_a_run_at_a_uri_is_retried_unchanged(browser, tmp_path):
    with s3_server("runs"), serve(tmp_path, output_roots=("s3://runs/team",)) as site:
        run_id = failed(site, output="s3://runs/team/moe")
        page = browser.new_page()
        page.goto(f"{site.url}/#token={site.service.plain['ann']}")
        expect(page.get_by_role("navigation")).to_be_visible()
        assert retry(page, run_id, lambda text: text) == {}
        again = page.url.rsplit("/", 1)[1]
        assert stored(site, again).config["output"] == f"s3://runs/team/moe/{again}"
        page.context.close()


@pytest.mark.slow
def test_an_estimate_that_was_lost_is_asked_for_again(site, page):
    page.goto("/#/submit")
    button = page.get_by_role("button", name="Submit")
    expect(button).to_be_enabled()
    site.stop()
    editor = Editor(page)
    editor.fill(editor.text.replace("name: demo", "name: other"))
    expect(page.get_by_text("The service cannot be reached.")).to_be_visible(timeout=20_000)
    expect(button).to_be_disabled()
    site.start()
    expect(button).to_be_enabled(timeout=20_000)


def test_the_time_of_a_run_is_that_of_its_attempts(site, page):
    run_id = begin(site)
    began = time.time()
    site.service.report(run_id, Event("run_started", data={"stages": run_example.STAGES}, time=began))
    site.service.report(run_id, Event("run_stopped", data={"reason": "cancelled"}, time=began + 3600))
    site.service.bring(run_id, RunState.STOPPING, RunState.CANCELLED)
    with site.service.database.write() as session:
        session.execute(update(RunRow).where(RunRow.id == run_id).values(started=began - 90_000))
    page.goto(f"/#/runs/{run_id}")
    facts = page.locator(".facts")
    expect(facts).to_contain_text("took 1 h 00 min")
    page.get_by_role("button", name="Resume").click()
    expect(facts).to_contain_text("queued")
    expect(facts).not_to_contain_text("running for")


def test_a_run_that_this_version_refuses_is_shown(site, page):
    run_id = begin(site)
    with site.service.database.write() as session:
        session.execute(update(RunRow).where(RunRow.id == run_id).values(config={"everything": 1}))
    page.goto(f"/#/runs/{run_id}")
    expect(page.get_by_role("region", name="Cost")).to_contain_text("unknown")


@pytest.mark.slow
def test_an_administrator_revokes_a_token_and_an_owner_renames_and_deletes_a_project(site, open_page):
    with site.service.database.write() as session:
        for name in [*map(str, range(200)), "ci"]:  # the last one is on the second page of both lists
            _, row = tokens.create(
                session, name=name, owner=f"of-{name}", scopes=["read"], expires=None, now=time.time()
            )
            if name != "ci":
                tokens.revoke(session, row, time.time())
    page = open_page(who="admin")
    page.goto("/#/submit")
    expect(page.get_by_label("Project").get_by_role("option", name="of-ci")).to_have_count(1)
    page.clock.install()
    page.goto("/#/account")
    page.get_by_role("button", name="Revoke ci").click()
    page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
    expect(page.get_by_text("201 revoked or expired tokens not shown")).to_be_visible()
    expect(page.locator(".audit")).to_be_visible()

    # Lists of many pages are not read again and again, as spending is.
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    with page.expect_request("**/v1/spending?**"):
        page.clock.fast_forward(120_000)
    assert not [url for url in asked if "/v1/tokens" in url]
    page = open_page(who="ann")
    site.service.ann.post("/v1/projects", json={"name": "draft"})
    page.goto("/#/projects")
    page.get_by_label("New name").fill("final")
    page.get_by_role("button", name="Rename").click()
    page.get_by_role("button", name="Delete final").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_role("heading", name="final of ann")).to_have_count(0)
    assert "final" not in [each["name"] for each in site.service.ann.get("/v1/projects").json()["items"]]
