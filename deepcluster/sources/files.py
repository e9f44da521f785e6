"""Folders and lists of image files."""
# strings and os.stat, not Path objects: twice as quick over a million files
# ruff: noqa: PTH112, PTH116, PTH118, PTH120, PTH122

import csv
import hashlib
import heapq
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from deepcluster.decode import BadImage
from deepcluster.sources.base import IMAGES, Classes, Skipped, Source, label, shown, stamp

UNREAD = (".heic", ".heif", ".avif", ".jxl", ".dng", ".arw", ".cr2", ".cr3", ".nef", ".raf")  # of phones and cameras


def files_source(
    location: str, paths: Iterable[str], skipped: Skipped, classes: Classes = None, root: str = ""
) -> Source:
    """One image a path. ``root`` is left out of the signature, so that a folder may be moved."""
    digest, names = hashlib.sha1(), dict[str, None]()
    kept: list[str] = []
    rows: list[int] = []
    for row, path in enumerate(paths):
        name = shown(path)
        try:
            if name in names:
                raise BadImage("listed twice")
            digest.update(stamp(path, root))
        except BadImage as error:
            skipped.append((name, str(error)))
        else:
            names[name] = None
            kept.append(path)
            rows.append(row)
    if not kept:
        first = " ".join(": ".join(skipped[0]).split())  # a name may have lines
        raise ValueError(f"{shown(location)}: no image can be read; the first of {len(skipped)} is {first}")
    known = [classes[row] for row in rows] if classes else None
    return Source(location, list(names), lambda i: Path(kept[i]), digest.hexdigest(), skipped, known)


def folder_source(location: str, root: str, otherwise: Callable[[list[str], Counter[str]], Source]) -> Source:
    """All images below ``root``; if none, ``otherwise`` of the shards and the counts of suffixes there."""
    images: list[str] = []
    shards: list[str] = []
    others: Counter[str] = Counter()
    skipped: Skipped = []
    todo, links = [root], list[str]()  # what links lead to comes last, so that a folder is listed under its own name
    seen: set[tuple[int, int]] = set()  # and once, which also ends loops
    while todo or links:
        folder = todo.pop() if todo else heapq.heappop(links)
        try:
            status = os.stat(folder)
            entries = [] if (status.st_dev, status.st_ino) in seen else list(os.scandir(folder))
        except OSError as error:
            skipped.append((shown(folder), f"cannot list: {str(error.strerror).lower()}"))
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.name.startswith(".") or entry.name in ("__MACOSX", "Thumbs.db"):
                continue
            if entry.is_symlink() and os.path.isdir(entry.path):
                heapq.heappush(links, entry.path)
            elif entry.is_dir(follow_symlinks=False):
                todo.append(entry.path)
            else:
                suffix = os.path.splitext(entry.name)[1].lower()
                others[suffix] += 1
                if suffix in IMAGES:
                    images.append(entry.path)
                elif suffix in UNREAD:
                    skipped.append((shown(entry.path), f"{suffix} cannot be read: convert it to JPEG"))
                elif suffix in (".tar", ".parquet"):
                    shards.append(entry.path)
    if not images:
        return otherwise(sorted(shards, key=os.fsencode), others)
    images.sort(key=os.fsencode)
    below = [path[len(root) :].lstrip(os.sep).split(os.sep, 1) for path in images]
    tops = [shown(parts[0]) if len(parts) == 2 else None for parts in below]
    classes: Classes = list(tops) if None not in tops and len(set(tops)) > 1 else None
    return files_source(location, images, skipped, classes, root)


def list_file_source(location: str, path: str, delimiter: str) -> Source:
    """Paths, one a line or in the column `path`; relative to here or else to the folder of the list."""
    text = Path(path).read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff")
    labels: Classes = None
    if delimiter:
        try:
            rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if any(row)]
        except csv.Error as error:
            raise ValueError(f"{shown(location)} is no readable table: {error}") from None
        head = [name.strip().lower() for name in rows[0]] if rows else []
        if "path" not in head and any(len(row) > 1 for row in rows):
            columns = " ".join(", ".join(map(shown, rows[0])).split())[:120]
            raise ValueError(f"{shown(location)} needs a column 'path'; it has {columns}")
        if "path" in head:
            rows = [row + [""] * (len(head) - len(row)) for row in rows[1:]]
            labels = [label(row[head.index("label")]) for row in rows] if "label" in head else None
        paths = [row[head.index("path") if "path" in head else 0] for row in rows]
    else:
        paths = [line for line in re.split(r"\r?\n", text) if line.strip()]
    if not paths:
        raise ValueError(f"{shown(location)} lists no image: give one path a line")
    beside = os.path.dirname(path)
    paths = [
        p if os.path.lexists(p) or not os.path.lexists(os.path.join(beside, p)) else os.path.join(beside, p)
        for p in map(os.path.expanduser, paths)
    ]
    return files_source(location, paths, [], labels)
