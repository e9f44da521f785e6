"""report.html: complete, small, offline, and deaf to what file names say."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from io import BytesIO

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from tiny import noise, store_of

from deepcluster.report import write_report

HOSTILE = [
    '"><img src=x onerror=alert(1)>.png',
    "' onmouseover='alert(1).png",
    "</script><script>alert(1)</script>.png",
    "--><svg onload=alert(1)>.png",
    "${script} $hash {0} %s &lt;b&gt; &amp;.png",
    "javascript:alert(1)",
    "two\nlines\ttab.png",
    "rtl \u202egnp.exe",
]
VOID = {"meta", "link", "img"}
KNOWN = {
    "html": {"lang"}, "meta": {"charset", "http-equiv", "content", "name"}, "link": {"rel", "href"}, "title": set(),
    "a": {"class", "href"}, "div": {"class", "role", "aria-label", "tabindex", "id"}, "th": {"scope", "data-v"},
    "td": {"class", "style", "data-v"}, "button": {"type", "title", "class"}, "img": {"src", "alt", "class"},
    "h2": {"id"}, "article": {"id"}, "p": {"class"}, "dl": {"class"}, "svg": {"viewbox", "role", "aria-label"},
    "path": {"d"}, "text": {"x", "y", "text-anchor"}, "polyline": {"points"}, "circle": {"class", "cx", "cy", "r"},
}  # fmt: skip
BARE = {
    "head", "style", "body", "header", "main", "table", "thead", "tbody", "tr", "h1", "h3", "h4",
    "dt", "dd", "b", "bdi", "span", "figure", "figcaption", "footer", "script",
}  # fmt: skip


class Page(HTMLParser):
    """Every element with its attributes, and the text in each; asserts that elements are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.script, self.said = [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.script += data
        elif self.open and self.open[-1] != "style":
            self.said.append(data)

    def all(self, tag, name=None):
        return [a if name is None else a[name] for t, a in self.elements if t == tag and (name is None or name in a)]


def made(n=60, k=4, names=None, seed=0, cluster=None):
    """Tables as a run leaves them; cluster i is the i-th largest."""
    rng = np.random.default_rng(seed)
    cluster = np.sort(rng.integers(0, k, n)) if cluster is None else np.asarray(cluster)
    order = np.argsort(-np.bincount(cluster, minlength=k), kind="stable")
    cluster = np.argsort(order)[cluster]
    names = names or [f"{i:04d}.png" for i in range(n)]
    assignments = pa.table(
        {
            "path": names,
            "cluster": cluster,
            "probability": rng.random(n).astype(np.float32),
            "margin": rng.random(n).astype(np.float32),
            "distance": rng.random(n).astype(np.float32),
            "is_outlier": np.arange(n) % 7 == 0,
        }
    )
    used, sizes = np.unique(cluster, return_counts=True)
    base = {"name": "", "cohesion": 0.9, "separation": 0.25}
    rows = [{"id": int(c), "size": int(n), **base} for c, n in zip(used, sizes, strict=True)]
    return assignments, pa.Table.from_pylist(rows)


def config(k=4, source="photos", methods=("simclr", "iic"), shape=(1, 8, 8)):
    stages = [{"method": m, "epochs": 3} for m in methods]
    plan = {"stages": stages, "n_clusters": k, "backbone": "convnet", "shape": list(shape), "seed": 5}
    return {"version": "1.2.3", "data": {"source": source}, "plan": plan}


def epochs(k=4, moved=0.93):
    pretext = [{"stage": 0, "epoch": e, "loss": 3.0 / e, "seconds": 1.5} for e in (1, 2, 3)]
    health = lambda e: {"active": k, "nmi_previous": None if e == 1 else moved}
    row = lambda e: {"stage": 1, "epoch": e, "loss": -0.1 * e, "seconds": 2.5, "health": health(e), "acc": 0.2 * e}
    return pretext + [row(e) for e in (1, 2, 3)]


def written(tmp_path, config, metrics, assignments, clusters, store, true=None):
    path = write_report(tmp_path, config, metrics, assignments, clusters, store, true)
    assert path == tmp_path / "report.html"
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 64), (3, 200), (0, 0)])
def test_the_page_is_complete(tmp_path, channels, size):
    store = store_of(noise(60, channels, size)) if channels else store_of(torch.rand(60, 5))
    text = written(tmp_path, config(), epochs(), *made(), store, np.arange(60) % 4)
    page, said = Page(text), " ".join(re.sub(r"\s+", " ", text).split())
    for fact in ("photos", "simclr for 3 epochs, then iic for 3 epochs", "1.2.3", "convnet on 1×8×8", "12.0 s", "60"):
        assert f"<bdi>{fact}</bdi>" in text
    assert "4 of 4 clusters are in use" in said
    assert "agree with an NMI of 0.93" in said
    assert [a["id"] for a in page.all("article")] == ["c0", "c1", "c2", "c3"]
    assert [h for h in page.all("a", "href") if h != "#clusters"] == ["#c0", "#c1", "#c2", "#c3"]
    captions = re.findall("<figcaption><span>(.*?)</span><b>(.*?)</b>", text)
    assert captions == [("Loss · simclr", "1.0000"), ("Loss · iic", "-0.3000"), ("Clusters in use · iic", "4"),
                        ("NMI with the epoch before · iic", "0.93"), ("Accuracy · iic", "0.600")]  # fmt: skip
    assert len(page.all("img")) == (len(page.all("button", "title")) if channels else 0)
    assert len(set(page.all("button", "title"))) == len(page.all("button", "title")) == 60  # each image once


def test_scores_are_those_of_the_labels_and_only_if_there_are_any(tmp_path):
    assignments, clusters = made()
    true = assignments["cluster"].to_numpy().copy()
    true[0] = -1
    text = written(tmp_path, config(), epochs(), assignments, clusters, None, true)
    assert "<dt>Accuracy</dt><dd>1.000</dd>" in text
    assert "labels of 59 images" in text
    for none in (None, np.full(60, -1)):
        assert "Scores" not in written(tmp_path, config(), epochs(), assignments, clusters, None, none)


def test_images_are_chosen_by_distance_and_margin_and_outliers_are_marked(tmp_path):
    assignments, clusters = made(50, 2, cluster=[0] * 40 + [1] * 10)
    text = written(tmp_path, config(2), [], assignments, clusters, store_of(noise(50, 1, 8)))
    first = re.split("<article", text)[1]
    distance, margin = assignments["distance"].to_numpy()[:40], assignments["margin"].to_numpy()[:40]
    typical = list(np.argsort(distance)[:9])
    border = [i for i in np.argsort(margin) if i not in typical][:6]
    far = [i for i in np.argsort(-distance) if i not in [*typical, *border]][:6]
    assert re.findall(r'title="(\d+).png"', first) == [f"{i:04d}" for i in [*typical, *border, *far]]
    marked = re.findall(r'title="(\d+).png" class=far', first)
    assert marked == [f"{i:04d}" for i in [*typical, *border, *far] if i % 7 == 0]


def test_thumbnails_show_the_pixels_of_their_image_also_in_another_order(tmp_path):
    assignments, clusters = made(20, 2)
    store = store_of(torch.arange(20, dtype=torch.uint8)[:, None, None, None].expand(20, 3, 8, 8).contiguous())
    store.names = [f"{i:04d}.png" for i in reversed(range(20))]
    store.data = store.data.flip(0).contiguous()
    store.rows, store.names = store.rows[:-1], store.names[:-1]  # 0000.png cannot be read any more
    page = Page(written(tmp_path, config(2), [], assignments, clusters, store))
    pictures = page.all("img")
    assert len(pictures) == 19
    for one in pictures:
        assert one["class"] == "tiny"
        pixels = np.asarray(Image.open(BytesIO(base64.b64decode(one["src"].partition(",")[2]))))
        assert np.unique(pixels).tolist() == [int(one["alt"][:4])]
    assert "0000.png" in page.all("button", "title")  # as text


@pytest.mark.parametrize("images", [True, False])
def test_hostile_names_do_nothing(tmp_path, images):
    names = [HOSTILE[i % len(HOSTILE)] if i < len(HOSTILE) else f"{i}{HOSTILE[i % len(HOSTILE)]}" for i in range(24)]
    assignments, clusters = made(24, 3, names=names)
    called = pa.array([*HOSTILE[:2], HOSTILE[4]])
    clusters = clusters.set_column(clusters.schema.get_field_index("name"), "name", called)
    store = store_of(noise(24, 3, 8))
    store.names = names
    text = written(tmp_path, config(3, source=HOSTILE[0] + HOSTILE[2], methods=(HOSTILE[0], HOSTILE[2])), epochs(3),
                   assignments, clusters, store if images else None)  # fmt: skip
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag in KNOWN or tag in BARE
        assert set(attributes) <= KNOWN.get(tag, set()), (tag, attributes)
    assert sorted(page.all("button", "title")) == sorted(names)  # to the letter
    assert sorted(page.all("img", "alt")) == (sorted(names) if images else [])
    assert [s.strip() for s in page.said if "onmouseover" in s and s in HOSTILE] != []  # the cluster's name is readable
    clean = written(tmp_path, config(3), epochs(3), *made(24, 3), None)
    assert page.script == Page(clean).script
    assert len(page.all("script")) == 1


@pytest.mark.parametrize("images", [True, False])
def test_nothing_is_loaded_from_anywhere(tmp_path, images):
    text = written(tmp_path, config(), epochs(), *made(), store_of(noise(60, 3, 64)) if images else None)
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub('base64,[^"]+', "", text), re.I)
    assert all(re.match("data:image/(png|jpeg);base64,", src) for src in page.all("img", "src"))
    assert {link["href"] for link in page.all("link")} == {"data:,"}
    assert all(href.startswith("#") for href in page.all("a", "href"))
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert f"script-src 'sha256-{digest}';" in policy


def test_a_hundred_clusters_of_noise_stay_under_ten_megabytes(tmp_path):
    n, k = 1000, 100
    names = [f"{i}{'long' * 900}.png" if i % 2 else f"{i}.png" for i in range(n)]
    store = store_of(noise(n, 3, 96))
    store.names = names
    assignments, clusters = made(n, k, names=names, cluster=np.arange(n) % k)
    text = written(tmp_path, config(k), epochs(k), assignments, clusters, store)
    assert len(text.encode()) < 10_000_000
    articles = re.split("<article", text)[1:]
    assert len(articles) == k
    assert all("<img" in one for one in articles)


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
    text = written(tmp_path, config(), epochs(moved=moved), *made(20, 4, cluster=cluster), None)
    found = re.findall('<p class="odd">(.*?)</p>', text)
    assert len(found) == (warning is not None)
    assert not warning or warning in found[0]


def test_what_is_missing_is_left_out(tmp_path):
    assignments, clusters = made(10, 1, cluster=[0] * 10)
    bare = {"plan": config(1)["plan"]}
    clusters = clusters.set_column(
        clusters.schema.get_field_index("separation"), "separation", pa.array([None], pa.float64())
    )
    metrics = [{"stage": 0, "epoch": 1, "loss": float("nan")}, {"stage": 1, "epoch": 1, "loss": 2.0, "health": None}]
    text = written(tmp_path, bare, metrics, assignments, clusters, None)
    assert "<dt>Separation</dt><dd>–</dd>" in text
    assert re.findall("<figcaption><span>(.*?)</span>", text) == ["Loss · iic"]
    assert "Nothing was trained" in written(tmp_path, bare, [], assignments, clusters, None)


def test_a_long_curve_is_thinned_but_ends_where_it_ends(tmp_path):
    metrics = [{"stage": 0, "epoch": e, "loss": 5.0 if e < 1000 else 1.25} for e in range(1, 1001)]
    text = written(tmp_path, config(1, methods=("iic<b>",)), metrics, *made(10, 1, cluster=[0] * 10), None)
    figure = text[text.index("<figure>") : text.index("</figure>")]
    assert "<b>1.2500</b>" in figure
    assert 250 < figure.count('class="touch"') <= 301
    assert figure.count("epoch 1000: 1.2500</title>") == 1
    assert figure.count("epoch 1: ") == 1
