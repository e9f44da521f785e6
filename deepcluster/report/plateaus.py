"""RUN/k.html: how many clusters there are, with the evidence as curves and a table, and images of every answer.

One offline page without a script; paths pass through ``words.text``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deepcluster import __version__
from deepcluster.howmany import Evidence, Row
from deepcluster.report.words import count, number, text

STYLE = Path(__file__).parent / "style.css"
MEASURES = {
    "gain": ("Gain", "nats by which density falls in the shallowest valley between two of the k clusters; a merge to "
             "k − 1 would fill it"),
    "stability": ("Stability", "ARI with the clusters of other samples and seeds"),
    "generalisation": ("Generalisation", "recall of clusters by a linear model in images that it did not learn from"),
    "separation": ("Separation", "simplified silhouette: how much nearer images are to their mean than to the next"),
}  # fmt: skip
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True)
class Gallery:
    """What a cut into ``k`` looks like."""

    k: int
    sizes: list[int]  # k, images of each cluster
    paths: list[list[str]]  # of the most typical images of each
    pictures: list[list[str]]  # data: addresses of these, "" for those that are not there


def page(found: Evidence, of: str, galleries: Sequence[Gallery], recut: str = "") -> str:
    """The page as HTML; ``of`` names the source, ``recut`` is the command that chooses an answer, up to its number."""
    answer = text(found.sentence())
    chosen = f"<p>Choose: <code>{text(recut)} K</code>, with K up to {found.most}.</p>" if recut else ""
    sampled = "" if found.n_sampled == found.n_images else f", of which {found.n_sampled:,} were looked at"
    curves = "\n".join(_curve(name, found.rows) for name in MEASURES)
    notes = " ".join(f"{head}: {says}." for head, says in MEASURES.values())
    shown = "\n".join(_gallery(one) for one in galleries)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>How many clusters: {text(of)}</title>
<style>
{STYLE.read_text(encoding="utf-8")}
svg line {{ stroke: var(--odd); stroke-dasharray: 3 3; }}
.some {{ display: flex; flex-wrap: wrap; gap: 6px; margin: 4px 0 14px; }}
.some img {{ width: 64px; height: 64px; object-fit: contain; border: 1px solid var(--line); border-radius: 4px; }}
</style>
</head>
<body>
<header>
<h1>How many clusters: {text(of)}</h1>
<div class="health"><p>{answer}.</p>{chosen}</div>
</header>
<main>
<section id="evidence">
<h2>Evidence</h2>
<p class="note">{count(found.n_images, "image")}{sampled}; no label was used. Dashed lines: the answers. {notes}</p>
<div class="curves">{curves}</div>
<div class="wide" role="region" aria-label="Evidence for every k" tabindex="0"><table class="sizes">
{_table(found.rows)}
</table></div>
</section>
{shown}
<footer>Written by deepcluster {text(__version__)}. This page is one file: it loads nothing and sends nothing.</footer>
</main>
</body>
</html>
"""


def _table(rows: Sequence[Row]) -> str:
    heads = "".join(
        f'<th scope="col">{head}</th>' for head in ("k", *(head for head, _ in MEASURES.values()), "Answer")
    )
    lines = "\n".join(
        f'<tr><th scope="row">{row.k}</th>'
        + "".join(f"<td>{number(getattr(row, name))}</td>" for name in MEASURES)
        + f"<td>{('', 'first', 'second', 'third')[row.plateau]}</td></tr>"
        for row in rows
    )
    return f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody>"


def _curve(name: str, rows: Sequence[Row]) -> str:
    """A figure of one measure over k."""
    values = [float(getattr(row, name)) for row in rows]
    low, high = min(0.0, *values), max(values) if name == "gain" else 1.0
    first, last = rows[0].k, rows[-1].k
    x = lambda k: 44 + 246 * (k - first) / max(1, last - first)  # noqa: E731
    y = lambda v: 96 - 84 * (v - low) / ((high - low) or 1)  # noqa: E731
    line = " ".join(f"{x(row.k):.1f},{y(v):.1f}" for row, v in zip(rows, values, strict=True))
    marks = "".join(f'<line x1="{x(r.k):.1f}" y1="12" x2="{x(r.k):.1f}" y2="96"/>' for r in rows if r.plateau)
    touch = '<circle class="touch" cx="{:.1f}" cy="{:.1f}" r="5"><title>k = {}: {:.2f}</title></circle>'
    dots = "".join(touch.format(x(row.k), y(v), row.k, v) for row, v in zip(rows, values, strict=True))
    title = MEASURES[name][0]
    return f"""<figure><figcaption><span>{title}</span></figcaption>
<svg viewBox="0 0 300 116" role="img" aria-label="{title} for k from {first} to {last}"><path d="M44 12V96H292"/>
<text x="39" y="16" text-anchor="end">{high:.1f}</text><text x="39" y="99" text-anchor="end">{low:.1f}</text>
<text x="44" y="111">k = {first}</text><text x="290" y="111" text-anchor="end">{last}</text>
{marks}<polyline points="{line}"/>{dots}</svg></figure>"""


def _gallery(one: Gallery) -> str:
    """The typical images of every cluster of one answer."""
    parts = []
    for cluster, (size, paths, pictures) in enumerate(zip(one.sizes, one.paths, one.pictures, strict=True)):
        shown = "".join(
            f'<img src="{picture}" alt="{text(path)}" title="{text(path)}">'
            if picture
            else f"<code>{text(path)}</code>"
            for path, picture in zip(paths, pictures, strict=True)
        )
        parts.append(f'<h4>{cluster}: {count(size, "image")}</h4>\n<div class="some">{shown}</div>')
    inner = "\n".join(parts)
    return f'<section id="k{one.k}">\n<h2>{one.k} clusters</h2>\n{inner}\n</section>'
