"""A headless Chromium for tests of the page."""

import shutil

import pytest
from playwright.sync_api import expect, sync_playwright

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser():
    """One per module: while it is open, no test of this process can run an event loop of its own."""
    if CHROMIUM is None:
        pytest.skip("no chromium on the PATH; on Debian: apt-get install chromium")
    expect.set_options(timeout=20_000)  # other work shares the machine
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()
