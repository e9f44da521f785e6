"""What the tests of security share: baits that act if they are executed, and limits that notice a bomb."""

import contextlib
import hashlib
import io
import json
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from finished import finished
from PIL import Image

from deepcluster import outputs


def png(i: int) -> bytes:
    """An honest image of 7 x 7 pixels."""
    file = io.BytesIO()
    Image.fromarray(np.full((7, 7, 3), 20 * i, np.uint8)).save(file, "png")
    return file.getvalue()


class Bait:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


class Slow(BaseException):
    """It took too long; nothing in the package catches this."""


@contextlib.contextmanager
def limits(megabytes: int = 512, seconds: int = 20) -> Iterator[None]:
    """So much more memory, and so much time, is all there is."""

    def stop(number: int, frame: object) -> None:
        raise Slow(f"more than {seconds} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, previous = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), before[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def refused(match: str, **limited: int) -> Iterator[None]:
    """A ValueError of one line, within limits."""
    with pytest.raises(ValueError, match=match) as caught, limits(**limited):
        yield
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def stranger() -> Path:
    """A finished run of nine images, here."""
    Path("photos").mkdir()
    for i in range(9):
        Path(f"photos/{i}.png").write_bytes(png(i))
    made = finished(Path("run"), "photos")
    (made / "metrics.jsonl").touch()
    sha1 = outputs.read_assignments(made)["sha1"].to_pylist()
    change(made / "config.json", data__content=hashlib.sha1("".join(sha1).encode()).hexdigest(), data__n_images=9)
    return made


def change(file: Path, **fields: object) -> None:
    """Fields of a JSON file, or of an object in it: data__size."""
    found = json.loads(file.read_text())
    for name, value in fields.items():
        *inside, last = name.split("__")
        place = found
        for one in inside:
            place = place[one]
        place[last] = value
    file.write_text(json.dumps(found))
