"""What the fuzz tests share: how many cases they try, how files are damaged, and what may come of it.

Nothing but the errors that are documented: a ValueError, an OSError or a FloatingPointError of one line, and of the
command line exit 2 or 3 with one line on stderr. In time, in little memory, and without a warning.
"""

import contextlib
import json
import logging
import os
import re
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepcluster.__main__ import main

SHARE = 50  # of a slow run's cases, one in so many is tried in every run of the tests
SECONDS, BYTES = 20, 2 << 30  # that a case may take


def cases(n: int) -> Any:
    """A test of n cases, and one of a few of them that is not slow; the test calls the function it is given."""
    slow = pytest.param(n, marks=pytest.mark.slow, id=f"{n} cases")
    few = max(4, n // SHARE)
    return pytest.mark.parametrize("n", [pytest.param(few, id=f"{few} cases"), slow])


def tried(n: int, check: Callable[..., None], *drawn: st.SearchStrategy) -> int:
    """Check n cases that are the same every time; returns how many there were."""
    done = 0

    @settings(max_examples=n, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.tuples(*drawn))
    def one(values: tuple) -> None:
        nonlocal done
        done += 1
        with bounded():
            check(*values)

    one()
    assert done >= n, f"{done} of {n} cases: there are no more"
    return done


class Hang(BaseException):
    """A case took too long."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """No case takes longer than SECONDS, or asks for BYTES more than are used already."""

    def stop(number: int, frame: object) -> None:
        raise Hang(f"longer than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    before = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        if pages is not None:
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, before[1]))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, before)


def documented(call: Callable[[], Any], *errors: type[Exception]) -> Any:
    """What it returns, or None after one of these errors (by default ValueError and OSError), told in one line."""
    try:
        return call()
    except (ValueError, OSError) as error:
        if errors and not isinstance(error, errors):
            raise
        one_line(str(error))
        return None


def one_line(text: str) -> None:
    """Something was said, on a line, and it is not that memory was short: then more was asked for than there can be."""
    assert text.strip()
    assert "\n" not in text, text
    assert "allocate" not in text.lower(), text


def command(argv: list[str], streams: pytest.CaptureFixture) -> int:
    """Exit code of the command line: 0, or 2 or 3 after one line on stderr; remarks of ours come before it."""
    said: list[str] = []
    log, listener = logging.getLogger("deepcluster"), logging.Handler(logging.DEBUG)
    listener.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(listener)
    streams.readouterr()
    try:
        code = main(argv)
    except SystemExit as end:
        code = end.code
    finally:
        log.removeHandler(listener)
    err = streams.readouterr().err
    for remark in said:
        shown = remark.encode("utf-8", "backslashreplace").decode()
        err = err.replace(shown + "\n", "", 1)
    lines = [line for line in err.split("\n") if line]
    if code == 0:
        assert all(line.startswith("deepcluster: warning: ") for line in lines), lines
        return 0
    assert code in (2, 3), (code, err)
    assert len(lines) == 1, lines
    assert re.match(r"deepcluster( [a-z-]+)?: error: ", lines[0]), lines
    one_line(lines[0])
    return code


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63) - 1, 10**25, 10**400]),
    st.floats(allow_nan=True),
    st.text(max_size=12),
    st.sampled_from(["auto", "none", "digits", "\udcff", "\ud800", "\0", "a\nb", "é" * 300, "../..", "1e400", "0x10"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)

PLACES = st.one_of(st.integers(0, 64), st.integers(-64, -1), st.integers(0, 1 << 20))
WORDS = st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x01\0\0\0"])
DAMAGE = st.lists(
    st.one_of(
        st.tuples(st.just("cut"), PLACES),
        st.tuples(st.just("flip"), PLACES, st.integers(1, 255)),
        st.tuples(st.just("word"), PLACES, WORDS),
        st.tuples(st.just("zero"), PLACES, st.integers(1, 600)),
        st.tuples(st.just("swap"), PLACES, PLACES, st.integers(1, 600)),
        st.tuples(st.just("insert"), PLACES, st.binary(min_size=1, max_size=20)),
        st.tuples(st.just("double"), PLACES, st.integers(1, 600)),
        st.tuples(st.just("drop"), PLACES, st.integers(1, 600)),
    ),
    min_size=1,
    max_size=3,
)


def damaged(data: bytes, damage: list[tuple]) -> bytes:
    """The bytes after each of these was done to them; places are taken modulo the length."""
    for kind, place, *how in damage:
        at = place % max(1, len(data))
        if kind == "cut":
            data = data[:at]
        elif kind == "flip":
            data = data[:at] + bytes(byte ^ how[0] for byte in data[at : at + 1]) + data[at + 1 :]
        elif kind == "word":
            data = data[:at] + how[0] + data[at + 4 :]
        elif kind == "zero":
            data = data[:at] + bytes(len(data[at : at + how[0]])) + data[at + how[0] :]
        elif kind == "swap":
            low, high = sorted((at, how[0] % max(1, len(data))))
            n = min(how[1], high - low)
            data = data[:low] + data[high : high + n] + data[low + n : high] + data[low : low + n] + data[high + n :]
        elif kind == "insert":
            data = data[:at] + how[0] + data[at:]
        elif kind == "double":
            data = data[: at + how[0]] + data[at:]
        else:
            data = data[:at] + data[at + how[0] :]
    return data


def changed(value: Any, way: list[int], instead: Any) -> Any:
    """JSON with one of its values, found by going this way down from the top, replaced; by "drop", left out."""
    if not way or not isinstance(value, dict | list) or not value:
        return instead
    keys = list(value) if isinstance(value, dict) else range(len(value))
    at, copy = keys[way[0] % len(keys)], value.copy()
    if len(way) == 1 and instead == "drop":
        del copy[at]
    else:
        copy[at] = changed(value[at], way[1:], instead)
    return copy


WAYS = st.lists(st.integers(0, 20), min_size=1, max_size=5)


def rewritten(file: Path, way: list[int], instead: Any) -> None:
    """Change one value of a JSON file."""
    file.write_text(json.dumps(changed(json.loads(file.read_text(encoding="utf-8")), way, instead)), encoding="utf-8")


DTYPES = st.sampled_from([torch.int64, torch.float16, torch.float64, torch.bool, torch.uint8, torch.complex64])
BENT = st.one_of(  # what may become of a tensor, by its name or number among the others
    st.tuples(st.integers(0, 30), st.just("drop"), st.none()),
    st.tuples(st.integers(0, 30), st.just("type"), DTYPES),
    st.tuples(st.integers(0, 30), st.just("shape"), st.sampled_from([(0,), (1,), (), (3,), (2, 2), (1, 1, 1)])),
    st.tuples(st.integers(0, 30), st.just("fill"), st.sampled_from([float("nan"), float("inf"), -1, 1e30, 7])),
)


def bent(tensors: dict[str, torch.Tensor], at: int, how: str, value) -> dict[str, torch.Tensor]:
    """The tensors with one of them damaged, in a way that the file keeps its form."""
    name = sorted(tensors)[at % len(tensors)]
    old = tensors[name]
    if how == "drop":
        return {key: one for key, one in tensors.items() if key != name}
    if how == "fill" and old.dtype == torch.bool:
        return tensors
    made = {
        "type": lambda: old.to(value),
        "shape": lambda: torch.zeros(value, dtype=old.dtype),
        "fill": lambda: torch.full_like(
            old, value if old.is_floating_point() else int(min(max(value, -9), 9)) if value == value else 0
        ),
    }
    return tensors | {name: made[how]()}


@contextlib.contextmanager
def copy_of(whole: Path):
    """A folder like this one, and the working directory in it, until the end of a case."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(shutil.copytree(whole, f"{folder}/copy"))
        try:
            yield
        finally:
            os.chdir(before)
