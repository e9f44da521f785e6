"""The map of report.html in a real Chromium: pointing, clicking, the lasso, keys, and its colours."""

import numpy as np
import pytest
from report_run import NAMES, K, N, tables

from deepcluster.landscape import landscape_of

pytest_plugins = ["report_page"]  # its fixtures


def spots(page, run):
    """(N, 2) places on the screen of the images in the order of NAMES, and the names in the order of the page."""
    page.locator("#canvas").scroll_into_view_if_needed()
    box = page.locator("#canvas").bounding_box()
    page.wait_for_function("() => document.getElementById('canvas').dataset.view")
    s, x, y = map(float, page.locator("#canvas").get_attribute("data-view").split())
    positions = landscape_of(run).positions
    low, high = positions.min(0), positions.max(0)
    world = (positions - (low + high) / 2) / (high - low).max() + 0.5
    return world * s + [x + box["x"] + 1, y + box["y"] + 1]  # 1: its border


def alone(places):
    """Images far enough from all others to be pointed at, the loneliest first."""
    apart = np.linalg.norm(places[:, None] - places[None], axis=2) + 1e9 * np.eye(len(places))
    return np.argsort(-apart.min(1))


DRAWN = """(one) => one.tagName === "IMG" ? one.naturalWidth
  : one.getContext("2d").getImageData(0, 0, 1, 1).data[3]"""
COLOUR = """(one) => { const c = document.createElement("canvas"); c.width = c.height = 1;
  c.getContext("2d").drawImage(one, 0, 0, 1, 1); return [...c.getContext("2d").getImageData(0, 0, 1, 1).data] }"""


def test_hovering_shows_the_image_under_the_pointer(opened, run):
    page = opened()
    places = spots(page, run)
    cards = set(page.evaluate("[...document.querySelectorAll('article button[data-i]')].map(one => one.title)"))
    lonely = [i for i in alone(places) if NAMES[i] not in cards][:4] + [i for i in alone(places) if NAMES[i] in cards][
        :2
    ]
    assert len(lonely) == 6
    for i in lonely:
        page.mouse.move(*places[i])
        page.wait_for_function("(name) => document.querySelector('#tip b')?.textContent === name", arg=NAMES[i][3:])
        shown = page.locator("#tip img, #tip canvas")
        page.wait_for_function(DRAWN, arg=shown.element_handle())
        assert shown.evaluate(COLOUR) == [i, 255 - i, 128, 255]
    page.mouse.move(5, 5)
    assert page.locator("#tip").is_hidden()


def test_a_click_shows_the_neighbours_of_an_image(opened, run):
    page = opened()
    places, land = spots(page, run), landscape_of(run)
    i = int(alone(places)[0])
    page.mouse.click(*places[i])
    look = page.locator("#look")
    assert look.locator("#what").inner_text() == NAMES[i][3:]
    assert look.locator(".path").inner_text() == NAMES[i]
    around = look.locator(".pics button")
    titles = [around.nth(j).get_attribute("title").split("\n")[0] for j in range(around.count())]
    assert titles == [NAMES[j] for j in land.neighbours[i]]
    assert around.locator("small").all_inner_texts() == [f"{d:.2f}" for d in land.distances[i]]
    around.nth(1).click()  # on to that one
    assert look.locator(".path").inner_text() == NAMES[land.neighbours[i, 1]]
    page.keyboard.press("Escape")
    assert look.is_hidden()
    assert page.evaluate("document.activeElement.id") == "canvas"


def test_an_image_is_shown_in_its_place_when_zoomed_in(opened, run):
    page = opened()
    i = int(page.locator("#c1 .outlying button").first.get_attribute("title")[3:7])
    page.click("#c1 .outlying button >> nth=0")
    page.click("text=Show on the map")
    assert page.locator("#look").is_visible()
    page.keyboard.press("Escape")
    page.focus("#canvas")
    for _ in range(8):
        page.keyboard.press("+")
    page.keyboard.press("Tab")  # takes the cross away
    middle = """() => { const c = document.getElementById("canvas");
      return [...c.getContext("2d").getImageData(c.width / 2 - 9, c.height / 2 - 9, 1, 1).data] }"""
    page.wait_for_function(f"(colour) => String(({middle})()) === String(colour)", arg=[i, 255 - i, 128, 255])


@pytest.mark.parametrize("keys", [[], ["Shift"]])
def test_a_lasso_selects_what_it_surrounds(opened, run, keys):
    page = opened(permissions=["clipboard-read", "clipboard-write"])
    places = spots(page, run)
    clusters = tables(N, K)[0]["cluster"]
    own = places[clusters == 1]
    corners = [own.mean(0) + own.std(0) * d for d in ([-1.2, -1.5], [2.5, -2.4], [0.3, 0.4], [-1.6, 1.4])]
    if not keys:
        page.click("#lasso")
    for key in keys:
        page.keyboard.down(key)
    page.mouse.move(*corners[0])
    page.mouse.down()
    for corner in [*corners[1:], corners[0]]:
        page.mouse.move(*corner, steps=5)
    page.mouse.up()
    inside = lambda p: (
        sum(
            (a[1] > p[1]) != (b[1] > p[1]) and p[0] < (b[0] - a[0]) * (p[1] - a[1]) / (b[1] - a[1]) + a[0]
            for a, b in zip(corners, corners[1:] + corners[:1], strict=True)
        )
        % 2
    )
    expected = {NAMES[i] for i in range(N) if inside(places[i])}
    assert 5 < len(expected) < len(own)
    assert page.inner_text("#chosen") == f"{len(expected)} images selected"
    counts = dict(one.rsplit(": ", 1) for one in page.locator("#counts li").all_inner_texts())
    assert sum(map(int, counts.values())) == len(expected)
    assert int(counts["Cluster 1 · red vans"]) == sum(NAMES[i] in expected for i in np.flatnonzero(clusters == 1))
    page.click("#copy")
    page.wait_for_function("() => document.getElementById('said').textContent.startsWith('Copied')")
    assert set(page.evaluate("navigator.clipboard.readText()").split("\n")) == expected
    page.click("#none")
    assert page.locator("#selected").is_hidden()


def test_the_map_can_be_used_by_keyboard(opened, run):
    page = opened(reduced_motion="reduce")
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    page.focus("#canvas")
    page.wait_for_function("() => document.getElementById('canvas').dataset.view")
    view = lambda: tuple(map(float, page.locator("#canvas").get_attribute("data-view").split()))
    settled = lambda: page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    before = view()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    settled()
    assert np.allclose(np.subtract(view(), before), [0, -60, 60], atol=0.01)
    page.keyboard.press("0")
    settled()
    assert view() == before
    for _ in range(3):
        page.keyboard.press("+")
    settled()
    assert view()[0] == pytest.approx(before[0] * 1.4**3, rel=1e-3)
    box = page.locator("#canvas").bounding_box()
    centre = [box["x"] + box["width"] / 2, box["y"] + box["height"] / 2]
    away = np.linalg.norm(spots(page, run) - centre, axis=1)
    assert away.min() < 2  # there is always an image at the cross
    nearest = NAMES[int(away.argmin())]
    assert page.text_content("#cross").startswith(nearest[3:])
    page.keyboard.press(" ")
    assert page.inner_text("#chosen") == "1 image selected"
    page.keyboard.press("Enter")
    assert page.inner_text("#look .path") == nearest
    assert page.evaluate("document.activeElement.id") == "what"


def test_the_wheel_zooms_only_after_a_click(opened, run):
    page = opened()
    places = spots(page, run)
    before = page.locator("#canvas").get_attribute("data-view")
    page.mouse.move(*(places.min(0) - 15))
    page.mouse.wheel(0, -200)
    page.evaluate("new Promise(done => setTimeout(done, 60))")
    assert page.locator("#canvas").get_attribute("data-view") == before
    spots(page, run)
    box = page.locator("#canvas").bounding_box()
    at = np.array([box["x"] + 20, box["y"] + 20])
    page.mouse.click(*at)
    page.mouse.wheel(0, -200)
    page.wait_for_function("(was) => document.getElementById('canvas').dataset.view !== was", arg=before)
    s, x, y = map(float, page.locator("#canvas").get_attribute("data-view").split())
    s0, x0, y0 = map(float, before.split())
    assert s > 1.3 * s0
    assert ((19 - x) / s, (19 - y) / s) == pytest.approx(
        ((19 - x0) / s0, (19 - y0) / s0), abs=0.01
    )  # it stays in place


def test_the_colours_can_be_told_apart(opened):
    """Of the map: contrast of 3 to the ground, and from each other for eyes of any kind (Machado et al., 2009)."""
    kinds = np.array([
        np.eye(3),
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ])  # fmt: skip
    to_lms = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                       [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
    to_lab = np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                       [0.0259040371, 0.7827717662, -0.8086757660]])  # fmt: skip
    for scheme in ("light", "dark"):
        page = opened(scheme=scheme)
        read = "(names) => names.map(one => getComputedStyle(document.body).getPropertyValue(one))"
        found = page.evaluate(read, ["--card", *(f"--p{i}" for i in range(8))])
        whole = [one if len(one) == 7 else "#" + "".join(2 * letter for letter in one[1:]) for one in found]
        srgb = np.array([[int(one[i : i + 2], 16) / 255 for i in (1, 3, 5)] for one in whole])
        rgb = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
        light = rgb @ [0.2126, 0.7152, 0.0722] + 0.05
        assert (np.maximum(light[1:], light[0]) / np.minimum(light[1:], light[0])).min() >= 3
        for seen in (rgb[1:] @ kind.T for kind in kinds):
            lab = np.cbrt(seen.clip(0, 1) @ to_lms.T) @ to_lab.T
            apart = np.linalg.norm(lab[:, None] - lab[None], axis=2) + np.eye(8)
            assert apart.min() >= 0.1
