"""The images in one folder a cluster: FOLDER/<id>[_<name>]/<file name>, those of junk clusters in FOLDER/junk/.

Names come from disks and from people, so they are made harmless: whatever they hold, they stay one part of a path.
"""
# strings and os, not Path objects: twice as quick over a million files
# ruff: noqa: PTH103, PTH113, PTH114, PTH118, PTH122, PTH123, PTH211

import errno
import functools
import os
import unicodedata
from collections.abc import Callable

from deepcluster.decode import BadImage
from deepcluster.export.task import Images, Item, Task, as_bytes, warn
from deepcluster.sources.base import IMAGES

LONGEST = 200  # bytes of a name; file systems allow 255, and a number may be added
FORBIDDEN = '/\\:*?"<>|'  # on one system or another
MAGIC = ((b"\xff\xd8\xff", ".jpg"), (b"\x89PNG", ".png"), (b"RIFF", ".webp"), (b"GIF8", ".gif"), (b"BM", ".bmp"),
         (b"II", ".tif"), (b"MM", ".tif"), (b"P", ".ppm"))  # fmt: skip


def folders(task: Task) -> str:
    """Links to the files, absolute and resolved; with ``copy``, or where images are no files, files of their own.

    Of several images of one name, capital letters aside, the second gets ~2 at its end, and so on. Images that are gone
    are left out, with a warning.

    Raises:
        ValueError: there are no images, they lie in ``out``, or links cannot be made there.
    """
    images, n = task.images(), len(task.names)
    junk = task.table["is_junk"].to_pylist() if "is_junk" in task.table.column_names else [False] * n
    called = {c: f"{c}_{safe(name)}" if name.strip() else str(c) for c, name in task.clusters().items()}
    taken: dict[str, dict[str, int]] = {}
    resolved = functools.lru_cache(os.path.realpath)  # of folders: much of the time otherwise
    made = {"links": 0, "copies": 0}
    for row, cluster in enumerate(task.table["cluster"].to_pylist()):
        folder = os.path.join(task.new, "junk" if junk[row] else "", called[cluster])
        if folder not in taken:
            os.makedirs(folder)
            taken[folder] = {}
        item = images.item(row)
        try:
            if item is not None:
                made[_place(item, row, images, folder, taken[folder], task, resolved)] += 1
        except BadImage:
            images.lost += 1
    if images.lost:
        warn(f"{images.lost} of {n} images cannot be read any more or are others now; they were left out")
    what = " and ".join(f"{count} {kind}" for kind, count in made.items() if count) or "no images"
    why = "" if task.copy or not made["copies"] else " (these images are no files of their own, so they were written)"
    return f"{what} in {len(taken)} folders{why}"


def _place(
    item: Item, row: int, images: Images, folder: str, taken: dict[str, int], task: Task,
    resolved: Callable[[str], str],
) -> str:  # fmt: skip
    """Link or write one image; says which of the two."""
    name = task.names[row]
    wanted = name.rsplit("/", 1)[-1]
    if isinstance(item, os.PathLike):
        above, wanted = os.path.split(os.fspath(item))
        path = os.path.join(resolved(above), wanted)
        path = os.path.realpath(path) if os.path.islink(path) else path
        if path.startswith(resolved(os.fspath(task.out)) + os.sep):
            raise ValueError(f"the image {name} lies in --out {task.out}, which is replaced; give another --out")
        if not task.copy:
            if not os.path.isfile(path):
                raise BadImage("no such file")
            _link(path, os.path.join(folder, free(safe(wanted), taken)), task)
            return "links"
    data, wanted = as_bytes(item), safe(wanted)
    if isinstance(item, os.PathLike) and not images.same(row, data):
        raise BadImage("another image than when the run was made")
    if os.path.splitext(wanted)[1].lower() not in IMAGES:
        wanted = safe(wanted + next((suffix for magic, suffix in MAGIC if data.startswith(magic)), ""))
    with open(os.path.join(folder, free(wanted, taken)), "xb") as file:
        file.write(data)
    return "copies"


def _link(path: str, place: str, task: Task) -> None:
    try:
        os.symlink(path, place)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EEXIST):
            raise
        raise ValueError(f"links cannot be made in {task.out} ({error.strerror}); add --copy") from None


def safe(text: str) -> str:
    """One part of a path on any system: no separators, control or invisible letters, not hidden, not too long."""
    text = "".join("_" if letter in FORBIDDEN or not letter.isprintable() else letter for letter in text)
    stem, _, suffix = text.rpartition(".")
    if not suffix.isalnum() or len(suffix.encode()) > 15 or stem + suffix == text:
        stem, suffix = text, ""
    suffix = suffix and "." + suffix
    stem = stem.strip(". ").encode()[: LONGEST - len(suffix.encode())].decode("utf-8", "ignore").rstrip(". ")
    return (stem or "_") + suffix


def free(name: str, taken: dict[str, int]) -> str:
    """This name, or with a number if a file system may take it for one that was given before; remembers it."""
    own = _folded(name)
    count = taken.get(own, 0) + 1
    given = name
    while count > 1:
        stem, suffix = os.path.splitext(name)
        given = f"{stem}~{count}{suffix}"
        if _folded(given) not in taken:
            taken[_folded(given)] = 1
            break
        count += 1
    taken[own] = count
    return given


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())
