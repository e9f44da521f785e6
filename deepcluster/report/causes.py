"""What else could explain the clusters: a table of factors, and how much each cluster differs in them."""

from deepcluster import nuisance
from deepcluster.nuisance import Effect
from deepcluster.report.found import Found
from deepcluster.report.words import label, number, text

CLUSTERS = 30  # of the largest, that the table shows


def causes(found: Found) -> str:
    """The section of the page, or "" where nothing was measured or nothing differs."""
    table = nuisance.read(found.folder)
    if table is None or not len(table) or table["row"].to_numpy().max() >= len(found):
        return ""
    effects = nuisance.effects(table, found.cluster)
    if not effects:
        return ""
    by_folder = found.config["data"].get("labels", "auto") == "auto"
    strong = nuisance.explaining(effects, len(found.clusters), by_folder)
    warned = "".join(f'<p class="odd">{text(nuisance.said(one)).capitalize()}.</p>\n' for one in strong)
    shown = found.clusters[:CLUSTERS]
    heads = "".join(f'<th scope="col">{one.factor.capitalize()}</th>' for one in effects)
    whole = "".join(f"<td>{number(one.size)}</td>" for one in effects)
    lines = "".join(
        f'<tr><th scope="row">{text(label(row))}</th>{"".join(_cell(one, row["id"]) for one in effects)}</tr>'
        for row in shown
    )
    cut = f" The {CLUSTERS} largest clusters are shown." if len(found.clusters) > CLUSTERS else ""
    return f"""<section id="causes"><h2>What else could explain the clusters</h2>
{warned}<p class="note">The first line is the share of each factor's variation that lies between the
clusters: near 1 they are little else than that factor; kinds of things mostly differ in some of them, too. Below it,
how far each cluster lies from all other images, in standard deviations (of words: Cohen's h, and the word); 0.2 is
little, 0.8 much.{cut}</p>
<div class="wide" role="region" aria-label="What else could explain the clusters" tabindex="0"><table class="matrix">
<thead><tr><th scope="col"><span class="hidden">Cluster</span></th>{heads}</tr></thead>
<tbody><tr><th scope="row">All</th>{whole}</tr>{lines}</tbody></table></div></section>"""


def _cell(effect: Effect, cluster: int) -> str:
    """One cluster and one factor; the stronger the darker."""
    size = effect.each.get(cluster)
    if size is None:
        return "<td>–</td>"
    word = f" <bdi>{text(effect.word[cluster][:24])}</bdi>" if cluster in effect.word else ""
    sign = "" if effect.n_words or effect.factor == "hue" else "+" if size > 0 else ""
    return f'<td style="--v:{min(1.0, abs(size) / 3):.3f}">{sign}{number(size, 1)}{word}</td>'
