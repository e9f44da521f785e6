"""report.html in a real Chromium: it shows, hears and keeps what it should, and runs nothing that a file is called."""

import json
import re
import time

import numpy as np
import pytest
from report_run import HOSTILE, K, N, a_run, plain_store, plan_of, tables

from deepcluster import outputs, results
from deepcluster.report import write_report

pytest_plugins = ["report_page"]  # its fixtures


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_renders_at_any_width_light_and_dark(opened, width, scheme):
    page = opened(width=width, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("article").count() == K
    page.wait_for_function("() => [...document.querySelectorAll('article img')].every(one => one.naturalWidth > 0)")
    dark = (
        sum(map(int, page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(","))) < 384
    )
    assert dark == (scheme == "dark")
    page.click("#c0 .pics button >> nth=0")
    page.fill("#c1 .name", "a name that is so long that it would not fit on any line of the whole page " * 2)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    assert paint < 2000


def test_the_filter_keeps_what_matches(opened, run):
    page = opened()
    page.fill("#filter", "RED vans")
    page.wait_for_function("() => document.getElementById('matches').textContent")
    size_of = lambda c: int((tables(N, K)[0]["cluster"] == c).sum())
    assert page.inner_text("#matches") == f"{size_of(1)} images in 1 cluster"
    assert page.locator("article:visible").evaluate_all("all => all.map(one => one.id)") == ["c1"]
    assert page.locator(".sizes tbody tr:visible").count() == 1
    page.fill("#filter", "0149.png")
    page.wait_for_function("() => document.getElementById('matches').textContent === '1 image in 1 cluster'")
    assert page.locator("article:visible").count() == 1
    page.click("#view")  # only what matches can be selected
    assert page.inner_text("#chosen") == "1 image selected"
    page.fill("#filter", "#2")
    page.wait_for_function(
        f"() => document.getElementById('matches').textContent === '{size_of(2)} images in 1 cluster'"
    )
    assert page.locator("article:visible").evaluate_all("all => all.map(one => one.id)") == ["c2"]
    page.fill("#filter", "")
    page.wait_for_function("() => !document.getElementById('matches').textContent")
    assert page.locator("article:visible").count() == K


def test_decisions_are_downloaded(opened, tmp_path):
    run = a_run(tmp_path / "run", 90, 6, ids=[7, 3, 12, 0, 5, 9], called={12: "owls", 0: "cats"}, model=False,
                groups={9: {"is_junk": True}})  # fmt: skip
    page = opened(write_report(run, None))
    assert page.locator("#tray").is_hidden()
    assert page.locator("#decisions .download").is_disabled()
    page.fill("#c7 .name", "  vans <b>  ")
    page.fill("#c12 .name", "")
    page.fill("#c0 .name", "dogs")
    page.fill("#c0 .name", "cats")  # as it was
    assert page.text_content("#c7 h3") == "Cluster 7 · vans <b>"
    assert page.text_content('.sizes tr[data-c="0"] a') == "Cluster 7 · vans <b>"
    for c in (7, 3):
        page.check(f"#c{c} .pick")
    page.click("#join")
    assert page.text_content("#c7 .fate") == "Merges with 3"
    for c in (12, 3):  # 3 belongs to 7 already, so these three become one
        page.check(f"#c{c} .pick")
    page.click("#join")
    page.check("#c5 .junk")
    page.check("#c0 .junk")
    page.uncheck("#c0 .junk")
    assert page.locator("#c9 input.junk").is_disabled()
    assert page.inner_text("#sum") == "4 decisions"
    with page.expect_download() as download:
        page.click("#tray .download")
    assert download.value.suggested_filename == "decisions.json"
    expected = {"format": 1, "names": {"7": "vans <b>", "12": ""}, "merge": [[3, 7, 12]], "junk": [5]}
    found = json.loads(download.value.path().read_text())
    assert re.fullmatch("[0-9a-f]{40}", found.pop("of"))
    assert found == expected
    for _ in range(4):
        page.click("#list button >> nth=0")
    assert page.locator("#tray").is_hidden()
    assert page.text_content("#c7 h3") == "Cluster 7"
    assert page.input_value("#c12 .name") == "owls"
    assert not page.is_checked("#c5 .junk")


def test_the_command_can_apply_what_was_downloaded(opened, run, tmp_path):
    from deepcluster.decisions import read
    from deepcluster.edits import Junk, Merge, Name

    page = opened()
    page.fill("#c0 .name", "mice")
    for c in (0, 1):
        page.check(f"#c{c} .pick")
    page.click("#join")
    page.check("#c1 .junk")
    with page.expect_download() as download:
        page.click("#decisions .download")
    download.value.save_as(tmp_path / "decisions.json")
    of = results.identity(outputs.read_assignments(run))
    assert read(tmp_path / "decisions.json", of).edits == (Merge((0, 1)), Name(0, "mice"), Junk(0))
    assert page.inner_text("#command") == f"deepcluster merge {run} --from decisions.json"


@pytest.mark.parametrize("images", [True, False])
def test_a_hostile_name_runs_no_script(opened, tmp_path, images):
    names = [HOSTILE[i % len(HOSTILE)] if i < len(HOSTILE) else f"{i}{HOSTILE[i % len(HOSTILE)]}" for i in range(27)]
    run = a_run(tmp_path / "run", 27, 3, names=names, called={0: HOSTILE[2], 1: HOSTILE[0], 2: HOSTILE[3]},
                plan=plan_of(3, methods=(HOSTILE[0], HOSTILE[2])), source=HOSTILE[0],
                images={"reason": [HOSTILE[0]] * 27, "duplicate_of": [None, *[names[0]] * 26]})  # fmt: skip
    page = opened(write_report(run, plain_store(names) if images else None, np.arange(27) % 3))
    page.focus("#canvas")
    page.keyboard.press("+")
    page.keyboard.press("Enter")
    assert page.inner_text("#look .path", timeout=1000).strip()
    page.keyboard.press("Escape")
    page.click("#view")
    page.fill("#c0 .name", HOSTILE[0])
    page.fill("#filter", "<img")
    page.wait_for_function("() => document.getElementById('matches').textContent")
    page.click("#legend button >> nth=0")
    shown = page.evaluate(
        "[...document.querySelectorAll('article button[data-i]')].map(one => one.title.split('\\n"
        + HOSTILE[0]
        + "')[0])"
    )
    assert sorted(shown) == sorted(names)
    assert (
        page.evaluate("document.querySelectorAll('[onerror], [onload], [onmouseover], iframe, main script').length")
        == 0
    )
    assert page.inner_text("h1").startswith(HOSTILE[0])


def test_everything_can_be_reached_by_tab(opened, tmp_path):
    names = tables(9, 2)[0]["path"]
    run = a_run(tmp_path / "run", 9, 2, images={"duplicate_of": [None] * 8 + [names[0]]})
    page = opened(write_report(run, plain_store(names), np.arange(9) % 2))
    page.check("#c0 .junk")
    every = "a[href], button, input, [tabindex='0']"
    page.evaluate(f"document.querySelectorAll({every!r}).forEach((one, i) => one.dataset.stop = i)")
    wanted = set(
        page.evaluate(f"""[...document.querySelectorAll({every!r})].filter(one => !one.disabled
        && (one.checkVisibility() || one.className === "skip")).map(one => one.dataset.stop)""")
    )
    assert (
        set(page.evaluate("[...document.querySelectorAll('article, canvas')].map(one => one.dataset.stop)")) <= wanted
    )
    seen, outlined = [], []
    page.evaluate("document.activeElement.blur()")
    page.evaluate("scrollTo(0, 0)")
    for _ in range(2 * len(wanted)):
        page.keyboard.press("Tab")
        stop, style = page.evaluate(
            "[document.activeElement.dataset.stop, getComputedStyle(document.activeElement).outlineStyle]"
        )
        if stop is not None:
            seen.append(stop)
            outlined.append(style == "solid")
    assert set(seen) == wanted
    assert all(outlined)


def test_heat_is_shown_on_demand(opened):
    page = opened()
    heat = page.locator("#c0 .typical .heat")
    assert heat.count() == 9
    opacity = lambda: heat.first.evaluate("one => getComputedStyle(one).opacity")
    assert opacity() == "0"
    page.check("#heat")
    assert float(opacity()) > 0.5


def test_the_table_sorts(opened):
    page = opened()
    order = lambda: page.locator(".sizes tbody tr").evaluate_all("all => all.map(one => one.dataset.c)")
    by_share = sorted("012", key=lambda c: -tables(N, K)[0]["cluster"].tolist().count(int(c)))
    assert order() == by_share == ["0", "1", "2"]
    page.click(".sizes thead button >> nth=1")
    assert order() == ["0", "1", "2"]  # the largest first
    page.click(".sizes thead button >> nth=1")
    assert order() == ["2", "1", "0"]
    assert page.get_attribute(".sizes thead th >> nth=1", "aria-sort") == "ascending"


@pytest.mark.slow
def test_thousands_of_images_are_there_at_once(opened, tmp_path):
    n = 3000
    names = tables(n, 20)[0]["path"]
    run = a_run(tmp_path / "run", n, 20, model=False)
    page = opened(write_report(run, plain_store(names)))
    began = time.perf_counter()
    page.fill("#filter", "in/2")
    page.wait_for_function("() => document.getElementById('matches').textContent === '1,000 images in 7 clusters'")
    assert time.perf_counter() - began < 2
    assert page.locator("#legend button").count() == 20
