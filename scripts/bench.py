"""How fast the parts are, each beside what it is measured against: ``python scripts/bench.py NAME [--json]``.

predict   labelling images that are in memory, beside the bare forward pass of the same network on ready tensors
report    writing report.html for 50,000 images (without its map), its size, and its first paint in Chromium

Rounds alternate between both sides, so that a busy machine slows both; printed are the medians and the range of the
ratio, which says how many times better ours is.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from deepcluster.backbones import make_backbone
from deepcluster.classifier import ROWS, Classifier, Spec
from deepcluster.store import Store

Case = dict[str, str | int | float]


def main() -> None:
    """Run one benchmark, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*BENCHES, "all"])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    for name in BENCHES if args.name == "all" else [args.name]:
        for case in BENCHES[name]():
            show(name, case, args.json)


def show(bench: str, case: Case, as_json: bool) -> None:
    """One line."""
    if as_json:
        print(json.dumps({"bench": bench, **case}), flush=True)
    else:
        print(f"{bench:8} {case['case']:24} ours {case['ours']:10.5g} {case['unit']}   {case['peer']} "
              f"{case['theirs']:10.5g}   ratio {case['ratio']:.3f} ({case['low']:.3f}-{case['high']:.3f}), "
              f"n = {case['n']}", flush=True)  # fmt: skip


def rates(case: str, peer: str, n_images: int, ours: Callable, theirs: Callable, rounds: int = 7) -> Case:
    """Images a second of both, in turns; the first round of each is not counted."""
    seconds: dict[Callable, list[float]] = {ours: [], theirs: []}
    for _ in range(rounds + 1):
        for run, taken in seconds.items():
            began = time.perf_counter()
            run()
            taken.append(time.perf_counter() - began)
    a, b = (taken[1:] for taken in seconds.values())
    ratios = [their / our for our, their in zip(a, b, strict=True)]
    return {"case": case, "peer": peer, "ours": n_images / statistics.median(a), "unit": "images/s",
            "theirs": n_images / statistics.median(b), "ratio": statistics.median(ratios), "n": rounds,
            "low": min(ratios), "high": max(ratios)}  # fmt: skip


def predict() -> Iterator[Case]:
    """Classifier.predict over a store, beside the network alone over the same batches as float tensors."""
    for name, shape, n in (
        ("convnet", (1, 16, 16), 16384),
        ("convnet", (3, 32, 32), 8192),
        ("resnet18", (3, 64, 64), 512),
    ):
        torch.manual_seed(0)
        backbone, dim = make_backbone(name, shape)
        classifier = Classifier(Spec(name, shape, "Linear", 10, "0"), backbone, torch.nn.Linear(dim, 10), dim)
        store = Store(torch.randint(0, 256, (n, *shape), dtype=torch.uint8), torch.arange(n).numpy(),
                      [str(i) for i in range(n)], [""] * n, [], torch.device("cpu"), "memory")  # fmt: skip
        ready = (store.data.float() / 255).contiguous(memory_format=torch.channels_last).split(ROWS)

        @torch.no_grad()
        def bare(network: torch.nn.Module = backbone, ready: tuple[torch.Tensor, ...] = ready) -> None:
            for images in ready:
                network(images)

        def ours(classifier: Classifier = classifier, store: Store = store) -> None:
            classifier.predict(store, ("cluster", "probability", "second", "margin", "distance", "is_outlier"))

        yield rates(f"{name} {shape[0]}x{shape[1]}x{shape[2]}", "bare", n, ours, bare)


BENCHES: dict[str, Callable[[], Iterator[Case]]] = {"predict": predict}

if __name__ == "__main__":
    main()
