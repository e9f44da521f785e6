"""Memory that a network gives back is kept for its next step, where the C library would return it to the system.

glibc returns what is larger than 32 MB, or lies at the end, as soon as it is freed; the next step then waits for the
system to hand the same pages out again, zeroed one by one: a third of a training step of a ResNet-18 on the CPU.
"""

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator

_TRIM, _MAP = -1, -3  # glibc's names for them, M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
_KEPT = {_MAP: 1 << 30, _TRIM: (1 << 31) - 1}  # larger blocks than that, such as images in memory, still go back
_USUAL = {_MAP: 32 << 20, _TRIM: 64 << 20}  # where glibc itself arrives once such blocks have been freed
_OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")  # the user chose already

_lock = threading.Lock()
_within = 0


def _library() -> ctypes.CDLL | None:
    """The C library, if it is glibc and left to us."""
    if any(name in os.environ for name in _OWN):
        return None
    try:
        found = ctypes.CDLL(None)
        return found if hasattr(found, "gnu_get_libc_version") else None
    except (OSError, TypeError):  # Windows
        return None


_glibc = _library()


@contextlib.contextmanager
def reused() -> Iterator[None]:
    """Within, freed memory is kept to be used again; at the end of the outermost one it is all given back.

    Changes no number. Does nothing where there is no glibc, or where its settings come from the environment.
    """
    _enter(1)
    try:
        yield
    finally:
        _enter(-1)


def _enter(change: int) -> None:
    global _within
    if _glibc is None:
        return
    with _lock:
        before, _within = _within, _within + change
        if 0 in (before, _within):
            for option, value in (_KEPT if _within else _USUAL).items():
                _glibc.mallopt(option, value)
        if not _within:
            _glibc.malloc_trim(0)
