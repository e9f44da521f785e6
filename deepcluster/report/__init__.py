"""RUN/report.html: what came out of a run, as one offline page that needs no server and loads nothing.

The page is page.html with its blanks filled, style.css, and the scripts one after the other. Whatever comes from a disk
(paths, names, sources) passes through ``words.text`` or ``words.data`` and never stands in a script; the page's
Content-Security-Policy allows that one script, by its hash, and nothing else.
"""

import base64
import hashlib
import logging
import shlex
from pathlib import Path
from string import Template

import numpy as np
import torch

from deepcluster import __version__, atomic
from deepcluster.classifier import Classifier
from deepcluster.report import cards, causes, facts, points
from deepcluster.report.curves import curves
from deepcluster.report.found import Found, read
from deepcluster.report.pictures import COLUMNS, Pictures, filters
from deepcluster.report.words import count, data, plain, text
from deepcluster.store import Store

HERE = Path(__file__).parent
SCRIPTS = ("base.js", "pictures.js", "map.js", "hands.js", "panels.js", "edits.js", "filter.js")
HEATS = 300  # heat-maps at most


def write_report(
    run: Path, store: Store | None, true: np.ndarray | None = None, to: Path | None = None, command: str = ""
) -> Path:
    """Write the page of a finished run, at most about 40 MB for any number of images.

    Args:
        run: its directory.
        store: its images, found by their paths; without one, or one of features, paths are shown.
        true: (N,) int64 labels in the order of the run's assignments, -1 where unknown.
        to: the file to write; default report.html in the run.
        command: what applies the decisions that are made on the page; default ``deepcluster merge``.

    Returns:
        The file.

    Raises:
        ValueError: the run did not finish, or is damaged.
    """
    found = read(run)
    choice = cards.choose(found)
    rows, known = points.arranged(found, points.chosen(found.paths, choice.rows))
    rank = np.full(len(found), -1, np.int64)
    rank[rows] = np.arange(len(rows))
    classifier = _classifier(run, store)
    tile, sheets, gallery, heats, blank = _pictures(found, choice, rows, rank, store, classifier)
    known |= {"tile": tile, "blank": blank, "columns": COLUMNS, "sheets": len(sheets)}
    known["of"] = found.identity
    blocks = {"data": data(known), "gallery": data(gallery), "heats": data(heats)}
    title = f"{facts.source(found.config)}: {count(len(found), 'image')} in {count(len(found.clusters), 'cluster')}"
    parts = "".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'"use strict";\n{{\n{parts}}}\n'
    page = Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(
        hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=(HERE / "style.css").read_text(encoding="utf-8"),
        title=text(title),
        version=text(found.config.get("version", __version__)),
        facts=facts.facts(found),
        health=facts.state(found),
        scores=facts.scores(found, true),
        causes=causes.causes(found),
        sampled=_sampled(len(rows), len(found)),
        mapped="" if known["xy"] else " hidden",
        table=cards.table(found),
        curves=curves(found.config["plan"], found.metrics),
        filters=_filters(classifier),
        heated="" if heats else " hidden",
        cards=cards.cards(found, choice, rank),
        copies=cards.copies(found, choice, rank),
        command=text(command or f"deepcluster merge {shlex.quote(plain(run))} --from decisions.json"),
        blocks="\n".join(f'<script type="application/json" id="{name}">{one}</script>' for name, one in blocks.items()),
        script=script,
        sheets="\n".join(f'<script type="text/plain" id="sheet{i}">{one}</script>' for i, one in enumerate(sheets)),
    )
    to = to or run / "report.html"
    atomic.write(to, page)
    return to


def _classifier(run: Path, store: Store | None) -> Classifier | None:
    """The run's model, where it can be read: the page is worth having without it."""
    try:
        return Classifier.load(run / "model", torch.device("cpu") if store is None else store.device)
    except ValueError as error:
        logging.getLogger("deepcluster").warning("%s; the report is without heat-maps and filters", error)
        return None


def _pictures(
    found: Found, choice: cards.Choice, rows: np.ndarray, rank: np.ndarray, store: Store | None,
    classifier: Classifier | None,
) -> tuple[int, list[str], dict[int, str], dict[int, str], list[int]]:  # fmt: skip
    """Side of a tile (0 without images), sheets of all, pictures and heat-maps by number, numbers without a picture."""
    if store is None or len(store.shape) != 3:
        return 0, [], {}, {}, []
    pictures = Pictures(store, found.paths)
    shown = choice.rows
    gallery = dict(zip(rank[shown].tolist(), pictures.each(shown), strict=True))
    heats: dict[int, str] = {}
    if classifier is not None and classifier.spec.shape == store.shape:
        each = max(1, HEATS // max(1, len(choice.cards)))
        typical = np.concatenate([card[0][:each] for card in choice.cards])[:HEATS]
        typical = typical[pictures.known(typical)]
        drawn = pictures.heats(classifier, typical, found.cluster[typical])
        heats = dict(zip(rank[typical].tolist(), drawn, strict=True))
    tile, sheets = pictures.sheets(rows)
    return tile, list(sheets), gallery, heats, np.flatnonzero(~pictures.known(rows)).tolist()


def _sampled(shown: int, n: int) -> str:
    return "" if shown == n else f" This page knows an even sample of {shown:,} of the {n:,} images."


def _filters(classifier: Classifier | None) -> str:
    """A figure of the first layer, or ""."""
    found = None if classifier is None else filters(classifier)
    if found is None:
        return ""
    picture, n = found
    return (
        f'<figure class="filters"><figcaption><span>First layer: {n} filters</span></figcaption>'
        f'<img src="{picture}" alt="The first {n} filters of the network; grey is 0"></figure>'
    )
