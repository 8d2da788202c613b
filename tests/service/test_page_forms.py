"""What the forms of the page send: a new budget, and the changes of a retry."""

import re

import pytest
from browser import browser
from page_runs import begin
from page_server import site as serve
from playwright.sync_api import expect
from s3_standin import s3_server
from test_page import open_page, page, site, state_pill, stored

from moedisco_ray.core.config import Clusters
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
    text = page.get_by_label("Configuration, YAML")
    expect(text).to_have_value(re.compile("sources:"))
    text.fill(edit(text.input_value()))
    button = page.get_by_role("button", name="Submit the retry")
    expect(button).to_be_enabled()
    with page.expect_request(f"**/v1/runs/{run_id}/retry") as asked:
        button.click()
    expect(state_pill(page)).to_have_text("queued")
    return asked.value.post_data_json["changes"]


def without(section):
    return lambda text: re.sub(rf"^{section}:.*\n( .*\n)*", "", text, flags=re.MULTILINE)


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


def test_a_section_removed_from_a_retry_gets_its_defaults(site, page):
    run_id = failed(site, clusters={"count": 2}, tokens={"total": 30_000_000})
    assert retry(page, run_id, without("clusters")) == {"clusters": {}}
    config = stored(site, page.url.rsplit("/", 1)[1]).settings
    assert (config.clusters, config.tokens.total) == (Clusters(), 30_000_000)


def test_a_setting_outside_of_sections_cannot_be_removed_from_a_retry(site, page):
    run_id = failed(site, seed=7)
    page.goto(f"/#/runs/{run_id}/retry")
    text = page.get_by_label("Configuration, YAML")
    expect(text).to_have_value(re.compile("seed: 7"))
    text.fill(text.input_value().replace("seed: 7\n", ""))
    page.get_by_role("button", name="Submit the retry").click()
    expect(page.get_by_role("alert")).to_have_text("seed: a retry needs a value; write one.")


def test_tags_with_a_dot_are_changed_in_a_retry(site, page):
    run_id = failed(site, tags={"team.a": "x", "grant": "y"})
    site.service.ann.patch(f"/v1/runs/{run_id}", json={"tags": {"team.a": "x", "grant": "z"}})
    changes = retry(page, run_id, lambda text: text.replace("team.a: x", "team.a: w"))
    assert changes == {"tags": {"team.a": "w", "grant": "z"}}
    assert stored(site, page.url.rsplit("/", 1)[1]).tags == {"team.a": "w", "grant": "z"}


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
