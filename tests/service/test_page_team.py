"""A team's day on the page, by the keyboard alone: find the better run, see why it is better, and improve on it."""

import re
import time
from collections.abc import Callable

import pytest
from browser import browser
from page_editor import Editor
from page_runs import begin, finish
from playwright.sync_api import Locator, Page, expect
from test_page import open_page, site, state_pill, stored

from moedisco_ray.core.records.events import Event
from service.database import runs
from service.domain.states import RunState

__all__ = ["browser", "open_page", "site"]
pytestmark = [pytest.mark.browser, pytest.mark.slow]

MOST_KEYS = 150


def go_to(page: Page, target: Locator) -> None:
    """Move the focus to an element with Tab."""
    expect(target).to_be_visible()
    for _ in range(MOST_KEYS):
        if target.evaluate("element => element.getRootNode().activeElement === element"):
            return
        page.keyboard.press("Tab")
    pytest.fail(f"Tab does not lead to {target}")


def press(page: Page, target: Locator, key: str = "Enter") -> None:
    go_to(page, target)
    page.keyboard.press(key)


def write(page: Page, target: Locator, text: str) -> None:
    go_to(page, target)
    page.keyboard.type(text)
    page.keyboard.press("Enter")


def choose(page: Page, target: Locator, letters: str) -> None:
    """Choose the option of a select that begins with these letters."""
    go_to(page, target)
    page.keyboard.type(letters)


@pytest.fixture
def team(site) -> dict[str, str]:
    """Ann's two finished runs and one that failed, by name."""
    ids = {"narrow": finish(site), "wide": finish(site), "steep": begin(site)}
    with site.service.database.write() as session:
        for name, perplexity in (("narrow", 41.25), ("wide", 38.5)):
            run = runs.get(session, ids[name])
            runs.amend(session, run, now=time.time(), name=name, perplexity=perplexity, bits_per_byte=1.5)
    reason = "submodel-0: the loss of step 20 is nan; lower the learning rate"
    site.service.report(ids["steep"], Event("run_failed", data={"message": reason, "error": "DivergedError"}))
    with site.service.database.write() as session:
        run = runs.get(session, ids["steep"])
        runs.amend(session, run, now=time.time(), name="steep")
        runs.transition(session, run, RunState.FAILED, reason=reason, now=time.time())
    return ids


def test_a_team_decides_what_to_train_next(site, team: dict[str, str], open_page: Callable[..., Page], tmp_path):
    """Ann adds Bob; Bob sorts, compares, retries the better run with one change at its price, and shares the link."""
    ann = open_page(width=1440)
    press(ann, ann.get_by_role("link", name="Projects"))
    member = ann.get_by_label("New member").first
    go_to(ann, member)
    ann.keyboard.type("bob")
    choose(ann, ann.get_by_label("Role", exact=True).first, "editor")
    press(ann, ann.get_by_role("button", name="Add").first)
    expect(ann.get_by_role("rowheader", name="bob")).to_be_visible()

    bob = open_page(width=1440, who="bob")
    press(bob, bob.get_by_role("link", name="Runs", exact=True))
    rows = bob.locator("table.runs tbody tr")
    expect(rows).to_have_count(3)
    expect(rows.filter(has_text="steep")).to_contain_text("the loss of step 20 is nan")
    press(bob, bob.get_by_role("button", name="Perplexity"))
    expect(rows.first).to_contain_text(re.compile(r"wide.*38\.50 best"))
    for name in ("narrow", "wide"):
        press(bob, bob.get_by_label(f"Choose {name}"), "Space")
    press(bob, bob.get_by_role("link", name="Compare 2 runs"))
    expect(bob.get_by_role("heading", name="Comparison of 2 runs")).to_be_visible()
    expect(bob.get_by_role("region", name="Settings that differ")).to_be_visible()
    expect(bob.get_by_role("region", name="Held-out perplexity")).to_be_visible()

    bob.goto(f"/#/runs/{team['wide']}")
    press(bob, bob.get_by_role("link", name="Retry with changes"))
    editor = Editor(bob).wait_for("name: demo")
    go_to(bob, editor.area)
    editor.fill(re.sub(r"(finetune:\n(?: .*\n)*?    lr: )\S+", r"\g<1>0.002", editor.text))
    bob.keyboard.press("Escape")
    estimate = bob.get_by_role("region", name="Estimate")
    expect(estimate).to_contain_text(re.compile(r"Reuses corpus, seed, .* of wide: \$[\d.]+ instead of \$[\d.]+"))
    [price] = re.findall(r"of wide: (\$[\d.]+) instead", estimate.inner_text())
    expect(estimate.locator("dl.figures > div").nth(1)).to_have_text(f"Cost{price}")
    press(bob, bob.get_by_role("button", name="changes only"))
    press(bob, bob.get_by_role("button", name="Submit the retry"))
    expect(state_pill(bob)).to_have_text("queued")
    again = stored(site, bob.url.rsplit("/", 1)[1])
    assert (again.owner, again.parent, again.config["finetune"]["optimizer"]["lr"]) == ("bob", team["wide"], 0.002)

    ann.goto(bob.url)
    expect(state_pill(ann)).to_have_text("queued")
    expect(ann.get_by_role("link", name="Compare with the earlier run")).to_be_visible()
