"""Tables and cards of clusters, groups of copies. Images are buttons with their number on the page."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepcluster.report.found import Found
from deepcluster.report.words import called, count, number, percent, text

MOST = 1000  # cards, of the largest clusters
MANY = 100  # above so many clusters a card shows fewer images
SHOWN, FEW = (9, 9, 9), (4, 3, 3)  # typical, borderline and outlying images a cluster
GROUPS, IN_GROUP = 12, 8  # of copies
MEASURES = ("cohesion", "separation", "probability", "confidence")
COLUMNS = ("Cluster", "Images", "Share", "Cohesion", "Separation", "Probability", "Confidence", "Outliers")
KINDS = ("Typical", "Borderline", "Outlying")


@dataclass(frozen=True)
class Choice:
    """Rows of the images that are shown outside the map."""

    cards: list[tuple[np.ndarray, ...]]  # of each cluster, in their order: typical, borderline, outlying
    copies: list[np.ndarray]  # the largest groups, each with its first image

    @property
    def rows(self) -> np.ndarray:
        """All of them, sorted, each once."""
        chosen = [rows for card in self.cards for rows in card] + self.copies
        return np.unique(np.concatenate([np.empty(0, np.int64), *chosen]))


def choose(found: Found) -> Choice:
    """Typical: the representatives; borderline: of smallest margin; outlying: odd ones first, then by distance.

    Nothing is shown twice on a card.
    """
    k = len(found.clusters)
    place = found.place
    order = np.argsort(place, kind="stable")
    ends = np.searchsorted(place[order], np.arange(k + 1))
    odd = found.outlier | np.array([bool(one) for one in found.reason])
    keys = [(found.distance, ~found.typical), (found.margin,), (-found.distance, ~odd)]
    cards = []
    for c in range(min(k, MOST)):
        left, card = order[ends[c] : ends[c + 1]], []
        for n, by in zip(SHOWN if k <= MANY else FEW, keys, strict=True):
            chosen = left[np.lexsort([key[left] for key in by])][:n]
            left = left[~np.isin(left, chosen)]
            card.append(chosen)
        cards.append(tuple(card))
    return Choice(cards, _groups(found.copy_of)[:GROUPS])


def _groups(copy_of: np.ndarray) -> list[np.ndarray]:
    """Rows of the first IN_GROUP images of each group of copies, the largest group first."""
    copies = np.flatnonzero(copy_of >= 0)
    first, sizes = np.unique(copy_of[copies], return_counts=True)
    largest = first[np.argsort(-sizes, kind="stable")][:GROUPS]
    return [np.array([one, *copies[copy_of[copies] == one][: IN_GROUP - 1]]) for one in largest.tolist()]


def table(found: Found) -> str:
    """Heads and lines of the table of clusters."""
    heads = "".join(f'<th scope="col"><button type="button">{name}</button></th>' for name in COLUMNS)
    lines = "\n".join(_line(i, row, found.clusters[0]["size"]) for i, row in enumerate(found.clusters))
    return f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}\n</tbody>"


def _line(place: int, row: dict[str, Any], largest: int) -> str:
    """``data-v`` is what the table is sorted by, ``data-c`` the place of the cluster."""
    size, name = row["size"], _named(place, row)
    linked = f'<a href="#c{row["id"]}">{name}</a>' if place < MOST else name
    cells = [
        f'<th scope="row" data-v="{row["id"]}">{linked}</th>',
        f'<td class="size" style="background-size:{55 * size / largest:.0f}% 60%" data-v="{size}">{size:,}</td>',
        f'<td data-v="{size}">{percent(row["share"])}</td>',
    ]
    for measure in MEASURES:
        shown = number(row[measure])
        cells.append(f'<td data-v="{-9 if shown == "–" else row[measure]}">{shown}</td>')
    cells.append(f'<td data-v="{row["outliers"]}">{row["outliers"]}</td>')
    return f'<tr data-c="{place}">{"".join(cells)}</tr>'


def cards(found: Found, choice: Choice, rank: np.ndarray) -> str:
    """A card for each of the largest clusters; ``rank`` (N,) is the number of an image on the page."""
    k = len(found.clusters)
    note = "" if k <= MOST else f'<p class="note">The {MOST:,} largest of {k:,} clusters.</p>\n'
    return note + "\n".join(_card(i, found.clusters[i], card, found, rank) for i, card in enumerate(choice.cards))


def _card(place: int, row: dict[str, Any], card: tuple[np.ndarray, ...], found: Found, rank: np.ndarray) -> str:
    """Everything about one cluster."""
    c = row["id"]
    facts = {"Images": f"{row['size']:,}", "Share": percent(row["share"])}
    facts |= {name.capitalize(): number(row[name]) for name in MEASURES} | {"Outliers": row["outliers"]}
    listed = "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in facts.items())
    near = "".join(
        f'<li><a href="#c{found.clusters[i]["id"]}">{_named(i, found.clusters[i])}</a> {number(away)}</li>'
        for i, away in row["nearest"]
    )
    near = f'<h4>Nearest clusters</h4><ul class="near">{near}</ul>' if near else ""
    groups = "\n".join(
        f'<div class="group {kind.lower()}"><h4>{kind}</h4><div class="pics">{_buttons(rows, found, rank)}</div></div>'
        for kind, rows in zip(KINDS, card, strict=True)
        if len(rows)
    )
    junk = " checked disabled" if row["is_junk"] else ""
    return f"""<article id="c{c}" data-c="{place}" tabindex="0" aria-labelledby="h{c}"{' class="junk"' if junk else ""}>
<div class="about"><h3 id="h{c}">{_named(place, row)}</h3>
<dl>{listed}</dl>
{near}
<div class="edit"><label>Name <input class="name" type="text" autocomplete="off" value="{text(row["name"])}"></label>
<div class="ticks"><label><input class="junk" type="checkbox"{junk}> Junk</label>
<label><input class="pick" type="checkbox"> Pick to merge</label></div><p class="fate"></p></div></div>
{groups}</article>"""


def _named(place: int, row: dict[str, Any]) -> str:
    """A cluster with its colour; the script changes the name when it is edited."""
    return f'<i class="dot" data-c="{place}"></i><span class="called" data-c="{place}">{called(row)}</span>'


def _buttons(rows: np.ndarray, found: Found, rank: np.ndarray) -> str:
    """One an image; marked where it is odd."""
    far = lambda row: " class=far" if found.outlier[row] or found.reason[row] else ""  # noqa: E731
    return "".join(f'<button type="button" data-i="{rank[row]}"{far(row)}></button>' for row in rows.tolist())


def copies(found: Found, choice: Choice, rank: np.ndarray) -> str:
    """How many images are copies of another, and the largest groups; "" without any."""
    rows = np.flatnonzero(found.copy_of >= 0)
    if not len(rows):
        return ""
    first = found.copy_of[rows]
    exact = pc.sum(pc.equal(found.sha1.take(pa.array(rows)), found.sha1.take(pa.array(first)))).as_py()
    originals, sizes = np.unique(first, return_counts=True)
    size = dict(zip(originals.tolist(), (sizes + 1).tolist(), strict=True))
    groups = "\n".join(
        f'<div class="group"><h4>{count(size[int(group[0])], "image")}</h4>'
        f'<div class="pics">{_buttons(group, found, rank)}</div></div>'
        for group in choice.copies
    )
    kinds = f"{count(exact, 'exact copy')} and {count(len(rows) - exact, 'near copy')}"
    said = f"{kinds} of {count(len(originals), 'image')}; each group begins with the image the others are copies of."
    if len(originals) > len(choice.copies):
        said += f" The {len(choice.copies)} largest of {len(originals):,} groups."
    return (
        f'<section id="copies"><h2>Copies</h2>\n<p class="note">{said}</p>\n'
        f'<div class="copies">{groups}</div></section>'
    )
