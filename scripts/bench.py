"""How fast the parts are, each beside what it is measured against: ``python scripts/bench.py NAME [--json]``.

predict     labelling images that are in memory, beside the bare forward pass of the same network on ready tensors
report      writing report.html for 50,000 images (without its map), its size, and its first paint in Chromium
checkpoint  share of epochs of ten seconds that saving them takes, for a small network and for ResNet-18

Rounds alternate between both sides, so that a busy machine slows both; rates are per second of one thread's processor
time, which other work disturbs least. Printed: the medians, and the range of the ratio (how many times better ours is).
"""

import argparse
from collections.abc import Callable, Iterator

from benchmarks.checkpoint import checkpoints
from benchmarks.common import Case, show
from benchmarks.predict import predict
from benchmarks.report import report

import deepcluster.methods  # noqa: F401  (registers them)

BENCHES: dict[str, Callable[[], Iterator[Case]]] = {"predict": predict, "report": report, "checkpoint": checkpoints}


def main() -> None:
    """Run one benchmark, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*BENCHES, "all"])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    for name in BENCHES if args.name == "all" else [args.name]:
        for case in BENCHES[name]():
            show(name, case, args.json)


if __name__ == "__main__":
    main()
