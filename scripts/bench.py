"""How fast the parts are, each beside what it is measured against: ``python scripts/bench.py NAME [--json]``.

predict     labelling images that are in memory, beside the bare forward pass of the same network on ready tensors
report      writing report.html for 50,000 images (without its map), its size, and its first paint in Chromium
checkpoint  share of epochs of ten seconds that saving them takes, for a small network and for ResNet-18

Rounds alternate between both sides, so that a busy machine slows both; rates are per second of one thread's processor
time, which other work disturbs least. Printed: the medians, and the range of the ratio (how many times better ours is).
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch

import deepcluster.methods  # noqa: F401  (registers them)
from deepcluster import atomic, checkpoint, ending
from deepcluster.backbones import make_backbone
from deepcluster.checkpoint import Saver
from deepcluster.classifier import COLUMNS, ROWS, Classifier, Spec
from deepcluster.landscape import landscape_of
from deepcluster.model import Model, Standardised
from deepcluster.plan import resolve
from deepcluster.recipe import make_recipe
from deepcluster.report import write_report
from deepcluster.settings import Settings
from deepcluster.store import Store
from deepcluster.trainer import Training, start

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
        print(f"{bench:10} {case['case']:24} ours {case['ours']:10.5g} {case['unit']}   {case['peer']} "
              f"{case['theirs']:10.5g}   ratio {case['ratio']:.3f} ({case['low']:.3f}-{case['high']:.3f}), "
              f"n = {case['n']}", flush=True)  # fmt: skip


def rates(case: str, peer: str, n_images: int, ours: Callable, theirs: Callable, rounds: int = 11) -> Case:
    """Images a second of both, in turns; the first round of each is not counted."""
    torch.set_num_threads(1)
    seconds: dict[Callable, list[float]] = {ours: [], theirs: []}
    for _ in range(rounds + 1):
        for run, taken in seconds.items():
            began = time.process_time()
            run()
            taken.append(time.process_time() - began)
    a, b = (taken[1:] for taken in seconds.values())
    ratios = [their / our for our, their in zip(a, b, strict=True)]
    return {"case": case, "peer": peer, "ours": n_images / statistics.median(a), "unit": "images/s",
            "theirs": n_images / statistics.median(b), "ratio": statistics.median(ratios), "n": rounds,
            "low": min(ratios), "high": max(ratios)}  # fmt: skip


def predict() -> Iterator[Case]:
    """Classifier.predict over a store, beside the network alone over the same batches as float tensors."""
    for name, shape, n in (
        ("convnet", (1, 16, 16), 4096),
        ("convnet", (3, 32, 32), 1024),
        ("resnet18", (3, 64, 64), 128),
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
            classifier.predict(store, COLUMNS)

        yield rates(f"{name} {shape[0]}x{shape[1]}x{shape[2]}", "bare", n, ours, bare)


def report() -> Iterator[Case]:
    """The page of 50,000 images of 32 px in ten clusters, beside what it may take: 60 s, 40 MB, 2 s to first paint."""
    with tempfile.TemporaryDirectory() as folder:
        run, store = Path(folder), images_like_photographs(50_000)
        torch.manual_seed(0)
        model = Model(*make_backbone("convnet", store.shape), (10,), Standardised)
        spec = Spec("convnet", store.shape, "Standardised", 10, "0")
        with torch.no_grad():
            model([store.data[:5000].float() / 255])
        ending.finish(model, 0, spec, store, run)
        device = torch.device("cpu")
        plan = resolve(Settings(method="iic", epochs=1), len(store), store.shape, device).to_dict()
        data = {"source": "bench", "data_root": None, "labels": "none", "size": [32, 3]}
        atomic.write_json(run / "config.json", {"data": data, "plan": plan})
        (run / "metrics.jsonl").touch()
        landscape_of(run)
        began = time.perf_counter()
        page = write_report(run, store, np.arange(len(store)) % 10)
        yield within("written", time.perf_counter() - began, 60, "s")
        yield within("size", page.stat().st_size / 1e6, 40, "MB")
        if milliseconds := first_paint(page):
            yield within("first paint", milliseconds / 1000, 2, "s")


def checkpoints(n_images: int = 50_000, epochs: int = 40, steps: int = 100) -> Iterator[Case]:
    """Share of training that saving takes, in epochs of ten seconds, beside what it may be: 2 %.

    States are written and flushed to the disk where temporary files are, in real seconds. Training is not done: the
    clock that Saver looks at is put forward instead.
    """
    store = Store(torch.zeros(n_images, 1, 1, 1, dtype=torch.uint8), np.arange(n_images), [""] * n_images,
                  [""] * n_images, [], torch.device("cpu"), "memory")  # fmt: skip
    for name, shape in (("convnet", (3, 32, 32)), ("resnet18", (3, 64, 64))):
        recipe, passed = make_recipe("sela"), 0.0
        state = start(Model(*make_backbone(name, shape), recipe.heads, recipe.head), store, recipe, Training())
        sum(z.square().sum() for z in state.network([torch.rand(4, *shape)])).backward()
        state.optimizer.step()  # AdamW has its moments now
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(checkpoint, "time") as clock:
            clock.monotonic = lambda: time.monotonic() + passed  # noqa: B023
            taken = []
            with Saver(Path(folder)) as saver:
                for epoch in range(epochs):
                    began = time.perf_counter()
                    for step in saver.during(range(steps), state):
                        passed += 10 / steps
                        state.step = step + 1
                    state.step, state.epoch = 0, epoch + 1
                    saver.epoch(state, epoch + 1 == epochs)
                    taken.append(time.perf_counter() - began)
            size = (Path(folder) / "last.pt").stat().st_size / 1e6
        saves, share = sum(seconds > 1e-3 for seconds in taken), 100 * sum(taken) / (10 * epochs)
        yield within(f"{name} {size:.0f} MB, {saves} saves", share, 2, "%", epochs)


def images_like_photographs(n: int) -> Store:
    """Blurred noise: neither as easily compressed as flat colour nor as badly as noise."""
    coarse = torch.randint(0, 256, (n, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
    names = [f"photos/2026/{i:06d}.jpg" for i in range(n)]
    return Store(fine, np.arange(n), names, [f"{i:040x}" for i in range(n)], [], torch.device("cpu"), "memory")


def within(case: str, ours: float, limit: float, unit: str, n: int = 1) -> Case:
    """One figure, of ``n`` measurements, beside what it may be."""
    ratio = limit / ours
    return {"case": case, "peer": "limit", "ours": ours, "unit": unit, "theirs": limit, "ratio": ratio, "n": n,
            "low": ratio, "high": ratio}  # fmt: skip


def first_paint(page: Path) -> float | None:
    """Milliseconds from opening the file to the first contentful paint in headless Chromium, if there is one."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        print("no Chromium on the PATH: first paint is not measured")
        return None
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        tab = p.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        tab.goto(page.as_uri())
        return float(tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))


BENCHES: dict[str, Callable[[], Iterator[Case]]] = {"predict": predict, "report": report, "checkpoint": checkpoints}

if __name__ == "__main__":
    main()
