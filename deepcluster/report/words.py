"""Numbers and names in the words of the page; whatever comes from a disk is made harmless here.

``text`` is for HTML text and quoted attributes, ``data`` for the JSON that the script reads; nothing else of a disk may
reach the page, and none of it the script.
"""

import html
import json
import math
from typing import Any


def plain(value: object) -> str:
    """Text that UTF-8 can hold: other bytes of a path as backslashes."""
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def text(value: object) -> str:
    """Safe as text and inside a quoted attribute, whatever it is."""
    return html.escape(plain(value), quote=True)


def data(value: Any) -> str:
    """JSON without any letter that could end a script element; ASCII only."""
    found = json.dumps(value, separators=(",", ":"))
    return found.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def number(value: float | None, digits: int = 2) -> str:
    """Rounded, or a dash if it is unknown."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def percent(share: float) -> str:
    """0.25 -> "25.0 %"."""
    return f"{100 * share:.1f} %"


def count(n: int, what: str) -> str:
    """1, "image" -> "1 image"; 2000, "image" -> "2,000 images"."""
    plural = what[:-1] + "ies" if what.endswith("y") else what + "s"
    return f"{n:,} {what if n == 1 else plural}"


def label(row: dict[str, Any]) -> str:
    """A cluster's number, and its name if it has one; to be escaped."""
    return f"Cluster {row['id']}" + (f" · {row['name']}" if row["name"] else "")


def called(row: dict[str, Any]) -> str:
    """A cluster's number, and its name if somebody gave it one; escaped."""
    return f"Cluster {row['id']}" + (f" · <bdi>{text(row['name'])}</bdi>" if row["name"] else "")
