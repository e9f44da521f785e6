"""Names that stand for code: a backbone ``package.module:function`` or ``hub:...`` is run only where the user named it.

A run, and the config.json beside a weight file, may come from a stranger: a name found there runs nothing. Trusted is
what the user gave as a flag or an argument: in this process, or before, if it still leads to the same file on this
machine, which is noted in the cache folder. And what $DEEPCLUSTER_TRUST lists.
"""

import contextlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from deepcluster import doctor

CODE = re.compile(r"(?!(?:torchvision|timm|onnx|hub):)[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # package.module:function
_given: set[str] = set()


def is_code(name: str) -> bool:
    """Whether a backbone's name stands for code: a function, or an entry of a repository for torch.hub."""
    return name.startswith("hub:") or CODE.fullmatch(name) is not None


def trust(name: str) -> None:
    """The user gave this name in this process: it may be run, now and where it is found in a run of the user's."""
    _given.add(name)
    line = f"{name}\t{origin(name)}"
    if is_code(name) and line not in _noted():
        with contextlib.suppress(OSError):  # then it has to be said again
            _notes().parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(
                os.open(_notes(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8"
            ) as f:
                f.write(line + "\n")


def check(name: str) -> None:
    """Make sure that the user wants the code behind ``name``: all of it, or the part before the last ``:`` or ``/``.

    Raises:
        ValueError: it was found in a file, and nobody said that it may be run.
    """
    whole = name.rpartition("/" if name.startswith("hub:") else ":")[0]
    listed = [one.strip() for one in os.environ.get("DEEPCLUSTER_TRUST", "").split(",")]
    if name not in _given and not {name, whole} & set(listed) and f"{name}\t{origin(name)}" not in _noted():
        raise ValueError(
            f"the backbone {name} is code, which is not run because a file names it: look at it, "
            f"then set DEEPCLUSTER_TRUST={whole} (a list is separated by commas)"
        )


def origin(name: str) -> str:
    """Where the code behind a name would be imported from; "" if there is none. Imports nothing."""
    if name.startswith("hub:"):
        return name
    with searched(Path.cwd()), contextlib.suppress(ImportError, ValueError):
        if spec := importlib.util.find_spec(name.partition(":")[0].partition(".")[0]):  # of a part it would import
            return str(spec.origin or [*(spec.submodule_search_locations or [])])
    return ""


@contextlib.contextmanager
def searched(folder: Path) -> Iterator[None]:
    """Imports look into this folder, too."""
    sys.path.insert(0, str(folder))
    try:
        importlib.invalidate_caches()
        yield
    finally:
        sys.path.remove(str(folder))


def _notes() -> Path:
    return doctor.cache_dir() / "trusted"


def _noted() -> list[str]:
    """What was trusted before, unless somebody else may have written it: the cache folder may be shared."""
    try:
        with _notes().open(encoding="utf-8") as file:
            about = os.fstat(file.fileno())
            mine = hasattr(os, "getuid") and about.st_uid == os.getuid() and not about.st_mode & 0o022
            return file.read().splitlines() if mine else []
    except (OSError, ValueError):
        return []
