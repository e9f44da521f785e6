"""Fixtures: a run with a report, and a real Chromium that opens it."""

import shutil

import numpy as np
import pytest
from report_run import NAMES, K, N, a_run, plain_store

from deepcluster.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'deepcluster[dev]'")
    if CHROMIUM is None:
        pytest.skip("needs chromium, chromium-browser or google-chrome on the PATH")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    copies = [NAMES[0] if i == 149 else None for i in range(N)]
    made = a_run(tmp_path_factory.mktemp("report") / "run", N, K, called={1: "red vans"}, groups={2: {"is_junk": True}},
                 images={"duplicate_of": copies, "reason": ["odd!" if i == 3 else "" for i in range(N)]})  # fmt: skip
    write_report(made, plain_store(NAMES), np.arange(N) % 3)
    return made


@pytest.fixture
def opened(browser, run):
    """Opens a page; afterwards there must have been no request, no error and no word on the console."""
    seen, contexts = [], []

    def see(page):
        page.on("console", lambda message: seen.append(("console", message.text)))
        page.on("pageerror", lambda error: seen.append(("error", str(error))))
        page.on("dialog", lambda dialog: (seen.append(("dialog", dialog.message)), dialog.dismiss()))
        page.on("request", lambda request: request.url.startswith(("file:", "data:", "blob:"))
                or seen.append(("request", request.url)))  # fmt: skip

    def open_page(path=run / "report.html", width=1280, scheme="light", **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(5000)
        see(page)
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert seen == []
