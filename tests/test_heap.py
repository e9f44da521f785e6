"""Memory that is freed between steps is kept for the next one, and given back at the end."""

import os
import subprocess
import sys

import pytest

from deepcluster import heap

COUNT = """
import resource, torch
from deepcluster import heap
assert heap._glibc is not None or {other}
def faults(times=5):
    resource.getrusage(resource.RUSAGE_SELF)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(12_000_000)  # 48 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
with heap.reused():
    with heap.reused():
        faults(12)
    inside, kept = faults(), held()
print(faults(), inside, kept - held())
"""


def measured(**settings: str) -> list[int]:
    """Page faults of five large tensors outside and inside, and the bytes given back at the end, in a new process."""
    environ = {name: value for name, value in os.environ.items() if name not in heap._OWN} | settings
    code = COUNT.format(other=bool(settings))
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(heap._library() is None, reason="glibc's settings only, unless the environment has them")
def test_freed_memory_is_used_again_within_and_given_back_after() -> None:
    outside, inside, returned = measured()
    pages = 5 * 48_000_000 // os.sysconf("SC_PAGE_SIZE")
    assert outside > pages / 40  # with large pages, too
    assert inside < outside / 20
    assert returned > 40_000_000


@pytest.mark.skipif(heap._library() is None, reason="glibc's settings only, unless the environment has them")
def test_settings_of_the_environment_are_left_alone() -> None:
    outside, inside, _ = measured(MALLOC_MMAP_THRESHOLD_="1000000")
    assert inside > outside / 2
