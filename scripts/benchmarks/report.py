"""The page of a run."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import Case, within
from deepcluster import atomic, ending
from deepcluster.backbones import make_backbone
from deepcluster.classifier import Spec
from deepcluster.landscape import landscape_of
from deepcluster.model import Model, Standardised
from deepcluster.plan import resolve
from deepcluster.report import write_report
from deepcluster.settings import Settings
from deepcluster.store import Store


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


def images_like_photographs(n: int) -> Store:
    """Blurred noise: neither as easily compressed as flat colour nor as badly as noise."""
    coarse = torch.randint(0, 256, (n, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear")
    names = [f"photos/2026/{i:06d}.jpg" for i in range(n)]
    return Store(fine, np.arange(n), names, [f"{i:040x}" for i in range(n)], [], torch.device("cpu"), "memory")


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
