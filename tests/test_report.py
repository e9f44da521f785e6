"""report.html without a browser: complete, small, offline, and deaf to what file names say."""

import base64
import hashlib
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from report_read import Page, written
from report_run import HOSTILE, a_run, epochs, plain_store, plan_of, tables
from tiny import noise, store_of

from deepcluster.report import write_report

KNOWN = {
    "html": {"lang"}, "meta": {"charset", "http-equiv", "content", "name"}, "link": {"rel", "href"},
    "a": {"class", "href"}, "div": {"class", "role", "aria-label", "tabindex", "id", "hidden", "aria-live"},
    "th": {"scope", "data-v", "title"}, "td": {"class", "style", "data-v"}, "tr": {"data-c"}, "code": {"id"},
    "button": {"type", "class", "id", "data-i", "aria-label", "aria-pressed", "disabled"}, "img": {"src", "alt"},
    "h2": {"id", "tabindex"}, "h3": {"id", "tabindex"},
    "article": {"id", "data-c", "tabindex", "aria-labelledby", "class"},
    "p": {"class", "id"}, "dl": {"class"}, "svg": {"viewbox", "role", "aria-label"}, "path": {"d"},
    "text": {"x", "y", "text-anchor"}, "polyline": {"points"}, "circle": {"class", "cx", "cy", "r"},
    "section": {"id", "hidden"}, "span": {"class", "data-c", "aria-hidden", "id"}, "i": {"class", "data-c"},
    "ul": {"class", "id"}, "input": {"id", "type", "placeholder", "autocomplete", "spellcheck", "class", "value",
    "checked", "disabled"}, "label": {"class"}, "output": {"id", "for"}, "nav": {"aria-label"}, "table": {"class"},
    "figure": {"class"}, "aside": {"id", "role", "aria-labelledby", "hidden"}, "script": {"type", "id"},
    "canvas": {"id", "tabindex", "role", "aria-label", "aria-describedby"},
}  # fmt: skip
BARE = {
    "head", "style", "title", "body", "header", "main", "thead", "tbody", "h1", "h4", "dt", "dd", "b", "bdi",
    "figcaption", "footer", "noscript", "li",
}  # fmt: skip


@pytest.mark.parametrize("size", [8, 64, 200, 0])
def test_the_page_is_complete(tmp_path, size):
    run = a_run(tmp_path / "run", called={2: "red vans"})
    store = store_of(noise(60, 3, size)) if size else None
    if store:
        store.names = tables()[0]["path"]
    text = written(run, store, np.arange(60) % 4)
    page, said = Page(text), " ".join(re.sub(r"\s+", " ", text).split())
    for fact in ("photos", "simclr for 3 epochs, then iic for 3 epochs", "1.2.3", "convnet on 3×8×8", "12.0 s", "60"):
        assert f"<bdi>{fact}</bdi>" in text
    assert "4 of 4 clusters are in use" in said
    assert "agree with an NMI of 0.93" in said
    assert f"deepcluster merge {run} --from decisions.json" in text
    assert [a["id"] for a in page.all("article")] == ["c0", "c1", "c2", "c3"]
    captions = re.findall("<figcaption><span>(.*?)</span><b>(.*?)</b>", text)
    assert captions == [("Loss · simclr", "1.0000"), ("Loss · iic", "-0.3000"), ("Clusters in use · iic", "4"),
                        ("NMI with the epoch before · iic", "0.93"), ("Accuracy · iic", "0.600")]  # fmt: skip
    on_cards = [path for c in range(4) for path in page.shown(f"c{c}")]
    assert sorted(on_cards) == sorted(tables()[0]["path"])  # each image once
    assert len(page.gallery) == (60 if size else 0)
    assert "First layer: 32 filters" in text
    vans = {"id": 2, "name": "red vans", "size": int((tables()[0]["cluster"] == 2).sum()), "junk": False}
    assert page.data["clusters"][2] == vans | {"colour": 2, "shape": 0}
    assert page.numbers("probability", "u1").tolist() == [
        round(255 * tables()[0]["probability"][tables()[0]["path"].index(page.path(i))]) for i in range(60)
    ]


def test_another_file_may_be_written(tmp_path):
    run = a_run(tmp_path / "run")
    assert write_report(run, None, to=tmp_path / "other.html") == tmp_path / "other.html"
    assert not (run / "report.html").exists()
    Page((tmp_path / "other.html").read_text(encoding="utf-8"))


def test_scores_are_those_of_the_labels_and_only_if_there_are_any(tmp_path):
    run = a_run(tmp_path / "run")
    true = tables()[0]["cluster"].copy()
    true[0] = -1
    text = written(run, None, true)
    assert "<dt>Accuracy</dt><dd>1.000</dd>" in text
    assert "labels of 59 images" in text
    for none in (None, np.full(60, -1)):
        assert "Scores" not in written(run, None, none)


def test_the_matrix_counts_classes_by_the_clusters_matched_to_them(tmp_path):
    #            cluster 0 (6 images), 1 (4), 2 (2); class 7 is mostly cluster 1, class 9 mostly cluster 0
    run = a_run(tmp_path / "run", 12, 3, cluster=[0] * 6 + [1] * 4 + [2] * 2)
    true = np.array([9, 9, 9, 9, 7, -1, 7, 7, 7, 9, 9, 9])
    text = written(run, None, true)
    matrix = text[text.index('class="matrix"') :]
    heads = re.findall(r'<th scope="col" title="Cluster \d">(\d)</th>', matrix)
    assert heads == ["1", "0", "2"]
    rows = re.findall(r'<tr><th scope="row">(\d)</th>(.*?)<td class="sum">(\d+)</td>', matrix)
    cells = {kind: re.findall(r'<td( class=hit)? style="--v:([\d.]+)">(\d+)</td>', row) for kind, row, _ in rows}
    assert [(kind, total) for kind, _, total in rows] == [("7", "4"), ("9", "7")]
    assert cells["7"] == [(" class=hit", "0.750", "3"), ("", "0.250", "1"), ("", "0.000", "0")]
    assert cells["9"] == [("", "0.143", "1"), (" class=hit", "0.571", "4"), ("", "0.286", "2")]


@pytest.mark.parametrize("images", [True, False])
def test_hostile_names_do_nothing(tmp_path, images):
    names = [HOSTILE[i % len(HOSTILE)] if i < len(HOSTILE) else f"{i}{HOSTILE[i % len(HOSTILE)]}" for i in range(27)]
    plan = plan_of(3, methods=(HOSTILE[0], HOSTILE[2]))
    called = {0: HOSTILE[0], 1: HOSTILE[1], 2: HOSTILE[4]}
    reason = [HOSTILE[2] + HOSTILE[7] if i % 7 == 0 else "" for i in range(27)]
    copies = [HOSTILE[2] if i == 5 else None for i in range(27)]
    images_too = {"reason": reason, "duplicate_of": copies}
    run = a_run(tmp_path / HOSTILE[5].replace("/", "|"), 27, 3, plan=plan, names=names, called=called,
                source=HOSTILE[0] + HOSTILE[2] + "\udcff", images=images_too)  # fmt: skip
    text = written(run, plain_store(names) if images else None, np.arange(27) % 3)
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag in KNOWN or tag in BARE
        assert set(attributes) <= KNOWN.get(tag, set()), (tag, attributes)
    assert sorted(page.path(i) for i in range(27)) == sorted(names)  # to the letter
    assert [row["name"] for row in page.data["clusters"]] == list(called.values())
    assert page.all("input", "value") == list(called.values())
    clean = Page(written(a_run(tmp_path / "clean", 27, 3)))
    assert page.scripts[""] == clean.scripts[""]
    assert [a for a in page.all("script") if "type" not in a] == [{}]
    for key, block in page.scripts.items():
        assert key == "" or not re.search("[<>&\u2028\u2029]", block)


@pytest.mark.parametrize("images", [True, False])
def test_nothing_is_loaded_from_anywhere(tmp_path, images):
    run = a_run(tmp_path / "run")
    text = written(run, plain_store(tables()[0]["path"]) if images else None)
    page = Page(text)
    outside = re.sub('base64,[^"<]+', "", text)
    assert not re.search(r"https?:|//[a-z]|@import|\burl\(", outside, re.I)
    assert all(src.startswith("data:image/webp;base64,") for src in page.all("img", "src"))
    assert {link["href"] for link in page.all("link")} == {"data:,"}
    assert all(href.startswith("#") for href in page.all("a", "href"))
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.scripts[""].encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert f"script-src 'sha256-{digest}';" in policy


@pytest.mark.parametrize(
    ("cluster", "moved", "warning"),
    [
        ([0, 1, 2, 3] * 5, 0.93, None),
        ([0, 1, 2, 2] * 5, 0.93, "Clusters without any image: 1."),
        ([0] * 17 + [1, 2, 3], 0.93, "may have collapsed"),
        ([0, 1, 2, 3] * 5, 0.3, "still changed their cluster"),
    ],
)
def test_trouble_is_said_in_words(tmp_path, cluster, moved, warning):
    run = a_run(tmp_path / "run", 20, 4, cluster=cluster, metrics=epochs(moved=moved))
    found = re.findall('<p class="odd">(.*?)</p>', written(run))
    assert len(found) == (warning is not None)
    assert not warning or warning in found[0]


def test_what_is_missing_is_left_out(tmp_path, caplog):
    metrics = [{"stage": 0, "epoch": 1, "loss": float("nan")}, {"stage": 1, "epoch": 1, "loss": 2.0, "health": None}]
    run = a_run(tmp_path / "one", 10, 1, cluster=[0] * 10, metrics=metrics, model=False,
                groups={0: {"separation": None}})  # fmt: skip
    text = written(run, plain_store(tables(10, 1)[0]["path"]))
    assert "<dt>Separation</dt><dd>–</dd>" in text
    assert "Nearest clusters" not in text
    assert re.findall("<figcaption><span>(.*?)</span>", text) == ["Loss · iic"]
    assert 'id="copies"' not in text
    assert Page(text).heats == {}
    assert "no model in" in caplog.text
    assert "Nothing was trained" in written(a_run(tmp_path / "two", 10, 1, metrics=[]))


def test_edits_leave_holes_names_and_junk(tmp_path):
    run = a_run(tmp_path / "run", 40, 3, ids=[5, 0, 9], called={9: "owls"}, groups={0: {"is_junk": True}})
    (run / "model" / "edits.safetensors").write_bytes(b"damaged, so the page is without the model")
    text = written(run, plain_store(tables(40, 3)[0]["path"]), np.arange(40) % 3)
    page = Page(text)
    assert [a["id"] for a in page.all("article")] == ["c5", "c0", "c9"]
    assert "3 clusters after editing" in text
    assert "Marked as junk: 1 cluster (0)" in text
    assert [row["junk"] for row in page.data["clusters"]] == [False, True, False]
    columns = tables(40, 3, ids=[5, 0, 9])[0]
    ids = [page.data["clusters"][place]["id"] for place in page.numbers("cluster", "<u2")]
    assert dict(zip(map(page.path, range(40)), ids, strict=True)) == dict(
        zip(columns["path"], columns["cluster"].tolist(), strict=True)
    )
    boxes = [a for a in page.all("input") if a.get("class") == "junk"]
    assert ["disabled" in box for box in boxes] == [False, True, False]
    assert re.findall(r'title="(Cluster.*?)">', text[text.index('class="matrix"') :])[-1] in (
        "Cluster 5", "Cluster 0", "Cluster 9 · owls")  # fmt: skip


def test_nearest_clusters_are_those_of_the_means(tmp_path):
    features = np.array([[1, 0]] * 4 + [[0.8, 0.6]] * 3 + [[0, 1]] * 2, np.float32)
    run = a_run(tmp_path / "run", 9, 3, cluster=[0] * 4 + [1] * 3 + [2] * 2, features=features)
    cards = re.split("<article", written(run))[1:]
    found = [re.findall(r'<li><a href="#c(\d)">.*?</a> ([\d.]+)</li>', card) for card in cards]
    assert found == [[("1", "0.20"), ("2", "1.00")], [("0", "0.20"), ("2", "0.40")], [("1", "0.40"), ("0", "1.00")]]


def test_labels_in_training_are_said(tmp_path):
    used = written(a_run(tmp_path / "run", data={"use_labels": True, "n_labelled": 40}))
    assert "40 labels were used in training" in used
    assert "<dt>Labels in training</dt><dd><bdi>40</bdi></dd>" in used
    assert "used in training" not in written(a_run(tmp_path / "blind"))


def test_the_chosen_method_is_said_with_the_reason(tmp_path):
    tried = [
        {"method": "spectral", "consistency": 0.874, "stability": 0.91, "score": 0.795, "seconds": 3.0},
        {"method": "kmeans<b>", "consistency": 0.8, "stability": 0.5, "score": 0.4, "seconds": 1.0},
        {"method": "iic", "consistency": 0.31, "stability": None, "score": 0.31, "seconds": 1.0},
    ]
    page = written(a_run(tmp_path / "run", data={"chosen": tried}))
    Page(page)
    said = "spectral, whose clusters agree with nearest neighbours (0.87) and with those found in other images (0.91)"
    others = "kmeans&lt;b&gt; 0.40, iic at most 0.31"
    assert f"<dt>Method chosen</dt><dd><bdi>{said}: score 0.80; {others}</bdi></dd>" in page
    assert "score 0.80</bdi>" in written(a_run(tmp_path / "alone", data={"chosen": tried[:1]}))
    assert "Method chosen" not in written(a_run(tmp_path / "named"))


@pytest.mark.parametrize(
    ("one", "says"),
    [
        ({"method": "iic"}, "data.chosen has no consistency"),
        ({"method": "iic", "consistency": "<script>"}, "data.chosen.consistency must be int or float"),
        ("iic", "data.chosen must be an object"),
    ],
)
def test_what_was_tried_in_a_damaged_run_is_refused(tmp_path, one, says):
    with pytest.raises(ValueError, match=says):
        written(a_run(tmp_path / "run", data={"chosen": [one]}))


def test_a_long_curve_is_thinned_but_ends_where_it_ends(tmp_path):
    metrics = [{"stage": 0, "epoch": e, "loss": 5.0 if e < 1000 else 1.25} for e in range(1, 1001)]
    run = a_run(tmp_path / "run", 10, 1, plan=plan_of(1, methods=("iic<b>",)), metrics=metrics)
    text = written(run)
    figure = text[text.index("<figure>") : text.index("</figure>")]
    assert "<b>1.2500</b>" in figure
    assert 250 < figure.count('class="touch"') <= 301
    assert figure.count("epoch 1000: 1.2500</title>") == 1
    assert figure.count("epoch 1: ") == 1


def test_files_that_do_not_fit_together_are_refused(tmp_path):
    run = a_run(tmp_path / "run")
    np.save(run / "features.npy", np.zeros((7, 2), np.float32))
    with pytest.raises(ValueError, match="60 assignments and 7 rows of features"):
        write_report(run, None)
    other = a_run(tmp_path / "other")
    pq.write_table(pq.read_table(other / "clusters.parquet").slice(1), other / "clusters.parquet")
    with pytest.raises(ValueError, match="other clusters than"):
        write_report(other, None)
    assert not (run / "report.html").exists()
    assert not (other / "report.html").exists()
