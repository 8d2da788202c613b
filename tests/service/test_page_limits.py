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
