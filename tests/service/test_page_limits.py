"""The page shows an owner's quota and prices, and when a run is removed; one click keeps it."""

import time

import pytest
from browser import browser
from page_runs import finish
from playwright.sync_api import expect
from test_page import open_page, site

from service.database import policies, runs
from service.domain.policies import Policies, Policy

__all__ = ["browser", "open_page", "site"]
pytestmark = pytest.mark.browser


def test_the_submit_page_shows_the_quota_and_whose_prices_hold(site, open_page):
    limits = Policy(prices={"low_mem_gpu": 0.5}, dollars_per_month=500, highest_priority=3, queued_runs=9)
    with site.service.database.write() as session:
        policies.replace(session, Policies(default=limits), time.time())
    page = open_page()
    page.goto(f"{site.url}/#/submit")
    expect(page.get_by_text("Your quota: 0 of 9 runs queued, 0 of 2 active, $0.00 of $500.00 used in ")).to_be_visible()
    expect(page.get_by_label("Priority")).to_have_attribute("max", "3")


def test_a_run_that_is_to_be_removed_says_so_and_one_click_keeps_it(site, open_page):
    run_id = finish(site)
    with site.service.database.write() as session:
        runs.amend(session, runs.lock(session, run_id), now=time.time(), expires_at=time.time() + 86_400)
    page = open_page()
    page.goto(f"{site.url}/#/runs/{run_id}")
    warning = page.get_by_text("This run is removed with its files after")
    expect(warning).to_be_visible()
    page.get_by_role("button", name="Keep").click()
    expect(page.get_by_role("button", name="Kept")).to_be_visible()
    expect(warning).to_be_hidden()
    assert site.service.ann.get(f"/v1/runs/{run_id}").json()["kept"] is True


def test_a_project_is_shared_and_its_viewer_sees_runs_without_changing_them(site, open_page):
    page = open_page()
    page.goto(f"{site.url}/#/projects")
    page.get_by_label("Name", exact=True).fill("law")
    page.get_by_role("button", name="Create").click()
    sheet = page.get_by_role("region", name="law of ann")
    sheet.get_by_label("New member").fill("bob")
    sheet.get_by_role("button", name="Add").click()
    expect(sheet.get_by_role("rowheader", name="bob")).to_be_visible()
    page.goto(f"{site.url}/#/submit")
    page.get_by_label("Project").select_option("law of ann")
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_role("link", name="law of ann")).to_be_visible()
    seen = open_page(who="bob")
    seen.goto(page.url)
    expect(seen.get_by_role("link", name="law of ann")).to_be_visible()
    expect(seen.get_by_role("button", name="Cancel")).to_have_count(0)
    expect(seen.get_by_role("link", name="Retry with changes")).to_have_count(0)
    site.service.upload("wiki", {"a.txt": b"text"}, project="law")
    seen.goto(f"{site.url}/#/projects")
    expect(seen.get_by_role("rowheader", name="wiki")).to_be_visible()
    expect(seen.get_by_role("button", name="Delete wiki")).to_have_count(0)
    page.goto(f"{site.url}/#/projects")
    page.get_by_role("button", name="Delete wiki").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_role("rowheader", name="wiki")).to_have_count(0)
    seen.get_by_role("button", name="Leave").click()
    seen.get_by_role("dialog").get_by_role("button", name="Remove").click()
    expect(seen.get_by_role("region", name="law of ann")).to_have_count(0)


def test_a_secret_and_a_url_for_notices_are_set_and_never_shown_again(site, open_page):
    site.service.ann.post("/v1/projects", json={"name": "law"}).raise_for_status()
    site.service.ann.put("/v1/projects/law/members/bob", json={"role": "viewer"}).raise_for_status()
    page = open_page()
    page.goto(f"{site.url}/#/projects")
    sheet = page.get_by_role("region", name="law of ann")
    sheet.get_by_text("Secrets and notices").click()
    sheet.get_by_label("Secret", exact=True).fill("lower-case")
    sheet.get_by_label("Value").fill("very secret")
    page.keyboard.press("Enter")
    expect(sheet.get_by_role("alert")).to_be_visible()
    expect(sheet.get_by_label("Value")).to_have_value("")
    sheet.get_by_label("Secret", exact=True).fill("HF_TOKEN")
    sheet.get_by_label("Value").fill("very secret")
    page.keyboard.press("Enter")
    expect(sheet.locator("li code")).to_have_text("HF_TOKEN")
    expect(sheet.get_by_role("alert")).to_have_count(0)
    expect(sheet.get_by_label("Value")).to_have_value("")
    sheet.get_by_label("URL for notices").fill("https://chat.example.org/hooks/very-secret")
    page.keyboard.press("Enter")
    expect(sheet.locator("p b")).to_contain_text("chat.example.org")
    assert "very" not in page.content()
    seen = open_page(who="bob")
    seen.goto(f"{site.url}/#/projects")
    sheet_seen = seen.get_by_role("region", name="law of ann")
    sheet_seen.get_by_text("Secrets and notices").click()
    expect(sheet_seen.locator("li code")).to_have_text("HF_TOKEN")
    expect(sheet_seen.get_by_label("Value")).to_have_count(0)
    sheet.get_by_role("button", name="Delete HF_TOKEN").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(sheet.locator("li code")).to_have_count(0)
    sheet.get_by_role("button", name="Delete the URL for notices").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(sheet.get_by_text("No URL gets notices")).to_be_visible()
