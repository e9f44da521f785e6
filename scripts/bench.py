"""How fast the parts are, each beside what it is measured against: ``python scripts/bench.py NAME [--json]``.

predict     labelling images that are in memory, beside the bare forward pass of the same network on ready tensors
report      writing report.html for 50,000 images (without its map), its size, and its first paint in Chromium
checkpoint  share of epochs of ten seconds that saving them takes, for a small network and for ResNet-18
views       random views of a batch, beside torchvision's, image by image and one draw a batch, and kornia's
store       reading a folder of photographs for the first time, and later epochs, beside torchvision's ImageFolder
extract     features of all images, beside the network alone on ready tensors
loop        an epoch of training with all that belongs to it, beside the bare steps of the same network
kmeans      k-means beside faiss and scikit-learn at equal inertia; a warm start beside a cold one; two processes
sinkhorn    streaming Sinkhorn beside the dense one in float64: time and memory
refresh     share of an epoch that labelling takes, extraction aside, beside what it may be: 10 %
memory      memory of a whole fit of 10,000 and 100,000 images (--full: a million), and how an image's time grows
scale       what an image or a row takes, of N and 10 N, by one process and by two: the constants of docs/scale.md
peers       time to an ACC on digits beside ClustPy's deep methods, and steps of SimCLR and SwAV beside lightly's

Rounds alternate between both sides, so that a busy machine slows both; rates are per second of one thread's processor
time, which other work disturbs least. Printed: the medians, and the range of the ratio (how many times better ours is).
"""

import argparse
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from benchmarks import table
from benchmarks.checkpoint import checkpoints
from benchmarks.common import Case, show
from benchmarks.extract import extract
from benchmarks.kmeans import clusterings
from benchmarks.loop import loop
from benchmarks.memory import memory
from benchmarks.peers import peers
from benchmarks.predict import predict
from benchmarks.refresh import refreshes
from benchmarks.report import report
from benchmarks.scale import scale
from benchmarks.sinkhorn import sinkhorns
from benchmarks.store import store
from benchmarks.views import views

import deepcluster.methods  # noqa: F401  (registers them)

BENCHES: dict[str, Callable[..., Iterator[Case]]] = {
    "predict": predict,
    "report": report,
    "checkpoint": checkpoints,
    "views": views,
    "store": store,
    "extract": extract,
    "loop": loop,
    "kmeans": clusterings,
    "sinkhorn": sinkhorns,
    "refresh": refreshes,
    "memory": memory,
    "scale": scale,
    "peers": peers,
}


def main() -> None:
    """Run one benchmark, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*BENCHES, "all"])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="put the figures into docs/benchmarks.md")
    parser.add_argument("--full", action="store_true", help="memory: a million images; peers: all lengths, three seeds")
    parser.add_argument("--data-root", help="peers --full: where torchvision's MNIST is")
    args = parser.parse_args()
    for name in BENCHES if args.name == "all" else [args.name]:
        known = inspect.signature(BENCHES[name]).parameters.keys()
        options = {option: value for option, value in vars(args).items() if option in known - {"name"}}
        load, cases = table.load(), []
        for case in BENCHES[name](**options):
            show(name, case, args.json)
            cases.append(case)
        if args.table and cases:
            written = table.section(name, table.command(), table.where(load), cases)
            table.update(args.table, name, written, [*BENCHES])


if __name__ == "__main__":
    main()
