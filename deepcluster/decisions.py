"""What people decided on the report page: the file it offers for download, as edits."""

import json
import operator
from pathlib import Path

from deepcluster.edits import FORMAT, Junk, Merge, Name, Step


def read(file: Path, of: str = "") -> Step:
    """What was decided on the report page: the file it offers for download.

    Raises:
        ValueError: it cannot be read, is no such file, or belongs to another state than ``of``.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        merges = [Merge(tuple(map(operator.index, group))) for group in found.get("merge", [])]
        gone = {c: min(merge.clusters) for merge in merges for c in merge.clusters}
        names = {int(c): str(name) for c, name in found.get("names", {}).items()}
        named = {gone.get(c, c): name for c, name in sorted(names.items(), reverse=True) if name or c not in gone}
        junk = sorted({gone.get(c, c) for c in map(operator.index, found.get("junk", []))})
        if found.get("format", FORMAT) > FORMAT:
            raise ValueError(f"it has format {found['format']}, this version reads {FORMAT}; upgrade deepcluster")
    except OSError as error:
        raise ValueError(f"cannot read {file}: {str(error.strerror).lower()}") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"cannot read the decisions in {file}: {' '.join(str(error).split())[:120]}") from None
    made = (*merges, *(Name(c, name) for c, name in sorted(named.items())), *map(Junk, junk))
    if of and found.get("of", of) != of:
        raise ValueError(f"{file} was decided on the report of another run, or before the last edit; write the report "
                         "anew and decide there")  # fmt: skip
    if not made:
        raise ValueError(f"there are no decisions in {file}: no names, merges or junk")
    return Step(made)
