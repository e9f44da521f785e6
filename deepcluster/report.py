"""RUN/report.html: what came out of a run, as one offline page that needs no server and loads nothing.

The page is report.html.in with its blanks filled. Whatever comes from a disk (paths, names, sources) is escaped by
``_text`` and stands in text or in a quoted attribute, never in the script; the page's Content-Security-Policy allows
that one script, by its hash, and nothing else.
"""

import base64
import hashlib
import html
import io
import math
import time
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from deepcluster import __version__, evaluate, outputs
from deepcluster.metrics import health
from deepcluster.store import Store

TEMPLATE = Path(__file__).parent / "report.html.in"  # its script must hold no dollar sign
SIDE = 96  # pixels of a thumbnail at most
TINY = 48  # below this an image is shown with sharp pixels
SHOWN = (9, 6, 6)  # typical, borderline and farthest images a cluster
BYTES = 7_500_000  # of all thumbnails and their paths together
POINTS = 300  # of a curve
MEASURES = ("cohesion", "separation", "probability")
SCORES = (("acc", "Accuracy"), ("nmi", "NMI"), ("ari", "ARI"), ("ami", "AMI"), ("purity", "Purity"))
COLUMNS = ("Cluster", "Images", "Share", "Cohesion", "Separation", "Probability", "Outliers")


def write_report(
    out: Path,
    config: dict[str, Any],
    metrics: list[dict[str, Any]],
    assignments: pa.Table,
    clusters: pa.Table,
    store: Store | None,
    true: np.ndarray | None = None,
) -> Path:
    """Write ``out``/report.html, under 10 MB for any number of images, also without ``store``: then paths are shown.

    The first four are a run directory and what its files of these names hold. Images are found in ``store`` by name;
    one of features has none to show. ``true`` (N,) int64, -1 where unknown, are labels in the order of ``assignments``.
    """
    plan = config["plan"] if isinstance(config["plan"], dict) else config["plan"].to_dict()
    config, n = {**config, "plan": plan}, len(assignments)
    cluster = assignments["cluster"].to_numpy()
    means = _means(cluster, assignments["probability"].to_numpy(), plan["n_clusters"])
    outliers = np.bincount(cluster[assignments["is_outlier"].to_numpy()], minlength=plan["n_clusters"])
    found = sorted(clusters.to_pylist(), key=lambda row: (-row["size"], row["id"]))
    for row in found:
        row |= {"share": row["size"] / n, "probability": means[row["id"]], "outliers": int(outliers[row["id"]])}
    pictures = Pictures(assignments, store, BYTES // max(1, len(found)))
    title = f"{_source(config)}: {n:,} images in {len(found)} clusters"
    template = TEMPLATE.read_text(encoding="utf-8")
    script = template.partition("<script>")[2].partition("</script>")[0]
    page = Template(template).substitute(
        hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        title=_text(title),
        version=_text(config.get("version", __version__)),
        facts=_facts(config, metrics, n),
        health=_health(cluster, plan["n_clusters"], metrics),
        scores=_scores(cluster, true, plan["n_clusters"]),
        columns="".join(f'<th scope="col"><button type="button">{name}</button></th>' for name in COLUMNS),
        rows="\n".join(_row(row, found[0]["size"]) for row in found),
        curves=_curves(plan, metrics),
        how=f"Click {'an image' if pictures.images else 'a name'} to copy its path.",
        cards="\n".join(_card(row, pictures) for row in found),
    )
    outputs.write_text(out / "report.html", page)
    return out / "report.html"


def _text(value: object) -> str:
    """Safe as text and inside a quoted attribute, whatever it is."""
    return html.escape(str(value).encode("utf-8", "backslashreplace").decode("utf-8"), quote=True)


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _source(config: dict[str, Any]) -> str:
    return str(config.get("data", {}).get("source", "images"))


def _called(row: dict[str, Any]) -> str:
    """A cluster's number, and its name if somebody gave it one; escaped."""
    return f"Cluster {row['id']}" + (f" · <bdi>{_text(row['name'])}</bdi>" if row["name"] else "")


def _means(cluster: np.ndarray, values: np.ndarray, k: int) -> np.ndarray:
    """(K,) mean of values (N,) in each cluster, NaN where it is empty."""
    with np.errstate(invalid="ignore"):
        return np.bincount(cluster, values, k) / np.bincount(cluster, minlength=k)


def _facts(config: dict[str, Any], metrics: list[dict[str, Any]], n: int) -> str:
    plan = config["plan"]
    seconds = sum(row.get("seconds") or 0 for row in metrics)
    stages = ", then ".join(f"{s['method']} for {s['epochs']} epochs" for s in plan["stages"])
    shape = "×".join(map(str, plan["shape"]))
    facts = {
        "Source": _source(config),
        "Plan": stages,
        "Images": f"{n:,}",
        "Clusters asked for": plan["n_clusters"],
        "Network": f"{plan['backbone']} on {shape}",
        "Seed": plan["seed"],
        "Training took": f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min",
        "Version": config.get("version", __version__),
        "Written": time.strftime("%Y-%m-%d %H:%M"),
    }
    long = ' class="long"'
    return "".join(
        f"<div{long if len(str(v)) > 22 else ''}><dt>{k}</dt><dd><bdi>{_text(v)}</bdi></dd></div>"
        for k, v in facts.items()
    )


def _health(cluster: np.ndarray, k: int, metrics: list[dict[str, Any]]) -> str:
    """What the sizes and the last epochs say, in words, without any label."""
    now = health(cluster, k)
    last = [row["health"].get("nmi_previous") for row in metrics if row.get("health")]
    moved = last[-1] if last else None
    share = _percent(now["largest_share"])
    said = (
        f"{now['active']} of {k} clusters are in use, the largest holds {share} of the images; "
        f"the sizes are as spread out as {now['effective']:.1f} equal clusters would be."
    )
    if moved is not None:
        said += f" The last two epochs agree with an NMI of {moved:.2f}; 1 means that no image moved."
    odd = []
    if now["active"] < k:
        odd.append(f"Clusters without any image: {k - now['active']}. Ask for fewer, or train longer.")
    if now["largest_share"] > max(0.5, 2 / k):
        odd.append("One cluster holds more than half of the images: the clustering may have collapsed.")
    if moved is not None and moved < 0.7:
        odd.append("Many images still changed their cluster at the end: train longer.")
    return f"<p>{said}</p>" + "".join(f'<p class="odd">{one}</p>' for one in odd)


def _scores(cluster: np.ndarray, true: np.ndarray | None, k: int) -> str:
    if true is None or not (true >= 0).any():
        return ""
    found = evaluate.scores(cluster, true, k)
    boxes = "".join(f"<div><dt>{name}</dt><dd>{_number(found[key], 3)}</dd></div>" for key, name in SCORES)
    note = f"Against the labels of {found['n_images']:,} images, which were used for these figures and nothing else."
    return f'<h2>Scores</h2>\n<dl class="scores">{boxes}</dl>\n<p class="note">{note}</p>'


def _row(row: dict[str, Any], largest: int) -> str:
    """A line of the table; ``data-v`` is what it is sorted by."""
    size, number = row["size"], row["id"]
    cells = [
        f'<th scope="row" data-v="{number}"><a href="#c{number}">{_called(row)}</a></th>',
        f'<td class="size" style="background-size:{55 * size / largest:.0f}% 60%" data-v="{size}">{size:,}</td>',
        f'<td data-v="{size}">{_percent(row["share"])}</td>',
    ]
    for name in MEASURES:
        known = row[name] is not None and math.isfinite(row[name])
        cells.append(f'<td data-v="{row[name] if known else -9}">{_number(row[name])}</td>')
    cells.append(f'<td data-v="{row["outliers"]}">{row["outliers"]}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _card(row: dict[str, Any], pictures: "Pictures") -> str:
    """Everything about one cluster."""
    facts = {"Images": f"{row['size']:,}", "Share": _percent(row["share"])}
    facts |= {name.capitalize(): _number(row[name]) for name in MEASURES} | {"Outliers": row["outliers"]}
    listed = "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in facts.items())
    groups = "\n".join(
        f'<div><h4>{name}</h4><div class="pics{"" if pictures.images else " paths"}">{"".join(shown)}</div></div>'
        for name, shown in zip(("Typical", "Borderline", "Farthest"), pictures.of(row["id"]), strict=True)
        if shown
    )
    return f'<article id="c{row["id"]}"><div><h3>{_called(row)}</h3><dl>{listed}</dl></div>\n{groups}</article>'


def _curves(plan: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    """Loss of each stage, and what is known of the clusters, over the epochs."""
    charts = []
    for number, stage in enumerate(plan["stages"]):
        rows = [row for row in metrics if row.get("stage") == number]
        checked = [(row["epoch"], row["health"]) for row in rows if row.get("health")]
        of = f" · {stage['method']}" if len(plan["stages"]) > 1 else ""
        charts += [
            _curve(f"Loss{of}", [(row["epoch"], row.get("loss")) for row in rows], 4),
            _curve(f"Clusters in use{of}", [(e, h.get("active")) for e, h in checked], 0, (0, plan["n_clusters"])),
            _curve(f"NMI with the epoch before{of}", [(e, h.get("nmi_previous")) for e, h in checked], 2, (0, 1)),
            _curve(f"Accuracy{of}", [(row["epoch"], row.get("acc")) for row in rows], 3, (0, 1)),
        ]
    drawn = "\n".join(chart for chart in charts if chart)
    return (
        f'<div class="curves">{drawn}</div>'
        if drawn
        else '<p class="note">Nothing was trained, or nothing recorded.</p>'
    )


def _curve(
    name: str, points: Sequence[tuple[int, float | None]], digits: int, limits: tuple[float, float] | None = None
) -> str:
    """An SVG figure of (epoch, value), or "" without any; ``limits`` of the vertical axis, else those of the values."""
    known = [(e, float(v)) for e, v in points if v is not None and math.isfinite(v)]
    if not known:
        return ""
    kept = known[:: -(-len(known) // POINTS)]
    kept += [] if kept[-1] == known[-1] else [known[-1]]
    low, high = limits or (min(v for _, v in known), max(v for _, v in known))
    first, last = known[0][0], known[-1][0]
    x = lambda e: 44 + 246 * (e - first) / max(1, last - first)  # noqa: E731
    y = lambda v: 96 - 84 * (v - low) / ((high - low) or 1)  # noqa: E731
    line = " ".join(f"{x(e):.1f},{y(v):.1f}" for e, v in kept)
    touch = '<circle class="touch" cx="{:.1f}" cy="{:.1f}" r="5"><title>epoch {}: {:.{}f}</title></circle>'
    dots = "".join(touch.format(x(e), y(v), e, v, digits) for e, v in kept)
    end, title, short = known[-1][1], _text(name), min(digits, 2)
    told = f"from {known[0][1]:.{digits}f} in epoch {first} to {end:.{digits}f} in epoch {last}"
    return f"""<figure><figcaption><span>{title}</span><b>{end:.{digits}f}</b></figcaption>
<svg viewBox="0 0 300 116" role="img" aria-label="{title}: {told}"><path d="M44 12V96H292"/>
<text x="39" y="16" text-anchor="end">{high:.{short}f}</text>
<text x="39" y="99" text-anchor="end">{low:.{short}f}</text>
<text x="44" y="111">epoch {first}</text><text x="290" y="111" text-anchor="end">{last}</text>
<polyline points="{line}"/><circle cx="{x(last):.1f}" cy="{y(end):.1f}" r="2.6"/>{dots}</svg></figure>"""


class Pictures:
    """Chooses images of a cluster and makes buttons of them, within ``budget`` bytes a cluster."""

    def __init__(self, assignments: pa.Table, store: Store | None, budget: int):
        self.images = store is not None and len(store.shape) == 3
        self.store, self.budget, self.paths = store, budget, assignments["path"]
        self.margin, self.distance = assignments["margin"].to_numpy(), assignments["distance"].to_numpy()
        self.outlier = assignments["is_outlier"].to_numpy()
        cluster = assignments["cluster"].to_numpy()
        self.order = np.argsort(cluster, kind="stable")
        self.cluster = cluster[self.order]
        names = self.paths.to_pylist() if self.images else []
        self.rows: dict[str, int] | None = None  # where the images lie in the store, if not in the order of the table
        if store is not None and self.images and names != store.names:
            self.rows = {name: i for i, name in enumerate(store.names)}

    def of(self, cluster: int) -> list[list[str]]:
        """Buttons of the typical, the borderline and the farthest images; nothing is shown twice."""
        low, high = np.searchsorted(self.cluster, [cluster, cluster + 1])
        left, groups = self.order[low:high], []
        for n, by in zip(SHOWN, (self.distance, self.margin, -self.distance), strict=True):
            chosen = left[np.argsort(by[left], kind="stable")][:n]
            left = left[~np.isin(left, chosen)]
            groups.append(self._within(chosen, self.budget * n // sum(SHOWN)))
        return groups

    def _within(self, ids: np.ndarray, budget: int) -> list[str]:
        shown, paths = [], self.paths.take(pa.array(ids)).to_pylist()
        pixels = self._pixels(paths, ids) if self.images else [None] * len(ids)
        for i, path, one in zip(ids, paths, pixels, strict=True):
            button = _button(path, one, bool(self.outlier[i]))
            budget -= len(button.encode())
            if budget < 0:
                break
            shown.append(button)
        return shown

    def _pixels(self, paths: list[str], ids: np.ndarray) -> list[np.ndarray | None]:
        """(C, H, W) uint8 of each, None for what the store does not have."""
        assert self.store is not None
        rows = [int(i) for i in ids] if self.rows is None else [self.rows.get(path, -1) for path in paths]
        found = self.store.take(torch.tensor([max(0, row) for row in rows], dtype=torch.int64)).cpu().numpy()
        return [one if row >= 0 else None for row, one in zip(rows, found, strict=True)]


def _button(path: str, pixels: np.ndarray | None, far: bool) -> str:
    """Its title is what a click copies."""
    name, inside = _text(path), _text(path.rpartition("/")[2] or path)
    if pixels is not None:
        tiny = ' class="tiny"' if max(pixels.shape[1:]) < TINY else ""
        inside = f'<img src="{_thumbnail(pixels)}" alt="{name}"{tiny}>'
    return f'<button type="button" title="{name}"{" class=far" if far else ""}>{inside}</button>'


def _thumbnail(pixels: np.ndarray) -> str:
    """(C, H, W) uint8 -> a data: address; PNG where JPEG would blur more than it saves."""
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels[:3].transpose(1, 2, 0)))
    image.thumbnail((SIDE, SIDE))
    kind = "png" if max(image.size) < TINY else "jpeg"
    file = io.BytesIO()
    image.save(file, kind, quality=80, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
