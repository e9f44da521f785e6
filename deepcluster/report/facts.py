"""What was run, how it went, and how it compares with labels where there are any. N images, K clusters, C classes."""

import time
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from deepcluster import __version__, evaluate, reliability
from deepcluster.metrics import contingency, health
from deepcluster.report.found import Found
from deepcluster.report.words import count, label, number, percent, text

SCORES = (("acc", "Accuracy"), ("nmi", "NMI"), ("ari", "ARI"), ("ami", "AMI"), ("purity", "Purity"))
WIDEST = 60  # classes and clusters the matrix shows


def source(config: dict[str, Any]) -> str:
    """What was clustered, as the user wrote it."""
    return str(config["data"]["source"])


def facts(found: Found) -> str:
    """A list of what was run."""
    config, plan = found.config, found.config["plan"]
    seconds = sum(row.get("seconds") or 0 for row in found.metrics)
    listed = {
        "Source": source(config),
        "Plan": ", then ".join(f"{s['method']} for {count(s['epochs'], 'epoch')}" for s in plan["stages"]),
        **_chosen(config["data"].get("chosen") or []),
        "Images": f"{len(found):,}",
        "Clusters asked for": "auto" if plan["auto_k"] else plan["n_clusters"],
        "Network": f"{plan['backbone']} on {'×'.join(map(str, plan['shape']))}",
        "Seed": plan["seed"],
        "Training took": f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min",
        "Labels in training": f"{config['data']['n_labelled']:,}" if config["data"].get("use_labels") else "none",
        "Version": config.get("version", __version__),
        "Written": time.strftime("%Y-%m-%d %H:%M"),
    }
    long = ' class="long"'
    return "".join(
        f"<div{long if len(str(v)) > 22 else ''}><dt>{k}</dt><dd><bdi>{text(v)}</bdi></dd></div>"
        for k, v in listed.items()
    )


def _chosen(tried: list[dict[str, Any]]) -> dict[str, str]:
    """Which of several methods was taken, and why; see ``choosing``."""
    if not tried:
        return {}
    best, *others = tried
    rest = [f"{one['method']} {'at most ' * (one['stability'] is None)}{number(one['score'])}" for one in others]
    own, other, score = (number(best[name]) for name in ("consistency", "stability", "score"))
    why = (
        f"{best['method']}, whose clusters agree with nearest neighbours ({own}) and with those found in other images "
        f"({other}): score {score}"
    )
    return {"Method chosen": "; ".join([why, *([", ".join(rest)] if rest else [])])}


def state(found: Found) -> str:
    """What the sizes and the last epochs say, in words, without any label."""
    auto, k = found.config["plan"]["auto_k"], len(found.clusters)
    asked = k if auto else found.config["plan"]["n_clusters"]
    now = health(found.place, k)
    last = [row["health"].get("nmi_previous") for row in found.metrics if row.get("health")]
    moved = last[-1] if last else None
    used = f"{k} of {asked} clusters are in use"
    if auto:
        used = f"{k} clusters, as many as the features speak for or somebody chose since"
    elif found.edited:
        used = f"{k} clusters after editing, {asked} were asked for"
    said = (
        f"{used}, the largest holds {percent(now['largest_share'])} of the images; "
        f"the sizes are as spread out as {now['effective']:.1f} equal clusters would be."
    )
    if moved is not None:
        said += f" The last two epochs agree with an NMI of {moved:.2f}; 1 means that no image moved."
    if found.config["data"].get("use_labels"):
        said += f" {count(found.config['data']['n_labelled'], 'label')} were used in training, so these are not blind."
    if junk := [row["id"] for row in found.clusters if row["is_junk"]]:
        said += f" Marked as junk: {count(len(junk), 'cluster')} ({', '.join(map(str, sorted(junk)))})."
    odd = []
    if k < asked and not found.edited:
        odd.append(f"Clusters without any image: {asked - k}. Ask for fewer, or train longer.")
    if now["largest_share"] > max(0.5, 2 / max(k, asked)):
        odd.append("One cluster holds more than half of the images: the clustering may have collapsed.")
    if moved is not None and moved < 0.7:
        odd.append("Many images still changed their cluster at the end: train longer.")
    return f"<p>{said}</p>" + "".join(f'<p class="odd">{one}</p>' for one in odd)


def scores(found: Found, true: np.ndarray | None) -> str:
    """Scores and the confusion matrix against labels (N,), or "" where no image has one."""
    if true is None or not (true >= 0).any():
        return ""
    plan = found.config["plan"]
    measured = evaluate.scores(found.cluster, true, len(found.clusters) if plan["auto_k"] else plan["n_clusters"])
    boxes = "".join(f"<div><dt>{name}</dt><dd>{number(measured[key], 3)}</dd></div>" for key, name in SCORES)
    of = count(measured["n_images"], "image")
    note = f"Against the labels of {of}, which were used for these figures and nothing else."
    sure = reliability.reliability(found.confidence, found.cluster, true)
    drawn = f"<h3>Confidence and what it was worth</h3>\n{reliability.curve(sure)}\n" if sure else ""
    return (
        f'<section id="scores"><h2>Scores</h2>\n<dl class="scores">{boxes}</dl>\n<p class="note">{note}</p>\n'
        f"{_confusion(found, true)}\n{drawn}</section>"
    )


def _confusion(found: Found, true: np.ndarray) -> str:
    """Classes by clusters, each cluster under the class it is matched with: what is right lies on the diagonal."""
    known = true >= 0
    place = found.place[known]
    table = contingency(place, true[known]).T  # (C, K)
    kinds, used = np.unique(true[known]), np.unique(place)
    matched = dict(zip(*(side.tolist() for side in linear_sum_assignment(table, maximize=True)), strict=True))
    rows = np.argsort(-table.sum(1), kind="stable")[:WIDEST]
    rows = np.sort(rows)
    left = [j for j in range(len(used)) if j not in set(matched.values())]
    columns = [matched[i] for i in rows.tolist() if i in matched] + left
    columns = columns[: max(WIDEST, len(rows))]
    heads = "".join(
        f'<th scope="col" title="{text(label(found.clusters[used[j]]))}">{found.clusters[used[j]]["id"]}</th>'
        for j in columns
    )
    lines = []
    for i in rows.tolist():
        total = table[i].sum()
        cells = "".join(
            f'<td{" class=hit" if matched.get(i) == j else ""} style="--v:{table[i, j] / total:.3f}">{table[i, j]}</td>'
            for j in columns
        )
        lines.append(f'<tr><th scope="row">{kinds[i]}</th>{cells}<td class="sum">{total:,}</td></tr>')
    cut = "" if table.size == len(rows) * len(columns) else f" Only the {len(rows)} largest classes are shown."
    return f"""<h3>Classes and clusters</h3>
<p class="note">Rows are classes by their code, columns clusters, each under the class it matches best (framed); the
last column counts the images of a class.{cut}</p>
<div class="wide" role="region" aria-label="Classes and clusters" tabindex="0"><table class="matrix">
<thead><tr><th scope="col"><span class="hidden">Class</span></th>{heads}<th scope="col">all</th></tr></thead>
<tbody>{"".join(lines)}</tbody></table></div>"""
