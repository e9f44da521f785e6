"""Training curves, as SVG figures."""

import math
from collections.abc import Sequence
from typing import Any

from deepcluster.report.words import text

POINTS = 300  # of a curve


def curves(plan: dict[str, Any], metrics: list[dict[str, Any]]) -> str:
    """Loss of each stage, and what is known of the clusters, over the epochs."""
    charts = []
    for index, stage in enumerate(plan["stages"]):
        rows = [row for row in metrics if row.get("stage") == index]
        checked = [(row["epoch"], row["health"]) for row in rows if row.get("health")]
        of = f" · {stage['method']}" if len(plan["stages"]) > 1 else ""
        charts += [
            _curve(f"Loss{of}", [(row["epoch"], row.get("loss")) for row in rows], 4),
            _curve(f"Clusters in use{of}", [(e, h.get("active")) for e, h in checked], 0, (0, plan["n_clusters"])),
            _curve(f"NMI with the epoch before{of}", [(e, h.get("nmi_previous")) for e, h in checked], 2, (0, 1)),
            _curve(f"Accuracy{of}", [(row["epoch"], row.get("acc")) for row in rows], 3, (0, 1)),
        ]
    drawn = "\n".join(chart for chart in charts if chart)
    if not drawn:
        return '<p class="note">Nothing was trained, or nothing recorded.</p>'
    return f'<div class="curves">{drawn}</div>'


def _curve(
    name: str, points: Sequence[tuple[int, float | None]], digits: int, limits: tuple[float, float] | None = None
) -> str:
    """A figure of (epoch, value), or "" without any; ``limits`` of the vertical axis, else those of the values."""
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
    end, title, short = known[-1][1], text(name), min(digits, 2)
    told = f"from {known[0][1]:.{digits}f} in epoch {first} to {end:.{digits}f} in epoch {last}"
    return f"""<figure><figcaption><span>{title}</span><b>{end:.{digits}f}</b></figcaption>
<svg viewBox="0 0 300 116" role="img" aria-label="{title}: {told}"><path d="M44 12V96H292"/>
<text x="39" y="16" text-anchor="end">{high:.{short}f}</text>
<text x="39" y="99" text-anchor="end">{low:.{short}f}</text>
<text x="44" y="111">epoch {first}</text><text x="290" y="111" text-anchor="end">{last}</text>
<polyline points="{line}"/><circle cx="{x(last):.1f}" cy="{y(end):.1f}" r="2.6"/>{dots}</svg></figure>"""
