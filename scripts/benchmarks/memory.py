"""How much memory a whole ``fit`` needs, and whether the time an image takes grows with their number."""

from collections.abc import Iterator
from typing import Any

from benchmarks.common import Case, within
from benchmarks.watch import blobs, space, watched

LIMIT = 1536  # MiB above the interpreter, of a million images
GROWN = 1.3  # times the seconds an image takes, at most
STEPS = 40  # of training: each takes what it takes, however many images there are
SETTINGS: dict[str, Any] = {
    "tiny": True, "method": "deepcluster", "n_clusters": 10, "image_size": 64, "epochs": 1, "batch_size": 512,
    "params": {"label_views": 1, "view": "clean", "restarts": 1, "overcluster": 1}, "device": "cpu",
}  # fmt: skip
EACH = ("read", "extract", "features", "copies", "looks", "tables")  # parts that look at every image


def memory(full: bool = False) -> Iterator[Case]:
    """A fit of 64 px images, mapped, with features of 512 numbers; ``full``: of a million of them, too (26 GB of disk).

    The network is one layer of that width, and training stops after STEPS: what grows with the images is all there.
    """
    seconds = []
    for n in (10_000, 100_000, *([1_000_000] if full else [])):
        with space() as folder:
            found = watched(blobs(folder / "images.npy", n), folder, steps=STEPS, **SETTINGS)
        yield within(f"fit, {n} images of 64 px", found["peak"] / 2**20, LIMIT, "MiB")
        seconds.append(sum(found["parts"][name]["cpu"] for name in EACH) / n)
        if len(seconds) > 1:
            yield within(f"an image of {n} or 10000", seconds[-1] / seconds[0], GROWN, "times")
