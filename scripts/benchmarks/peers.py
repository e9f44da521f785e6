"""Whole methods beside other packages': clustering digits beside ClustPy, steps of SimCLR and SwAV beside lightly.

Their side is what their own pages show. ClustPy: its defaults, with the number of clusters that ours is told (DDC finds
its own), on digits as scikit-learn has them, 8 x 8 and standardised. lightly: its examples with their transform,
loader, workers and optimizers, on the same network, from JPEG files. Labels are read for the scores only and stop
nothing.
"""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.common import CPU, Case, finished
from deepcluster import metrics, runs
from deepcluster.backbones import make_backbone
from deepcluster.doctor import cpu_bf16
from deepcluster.model import Model
from deepcluster.recipe import make_recipe
from deepcluster.settings import Settings
from deepcluster.sources import open_source
from deepcluster.store import Store, open_store
from deepcluster.trainer import Report, Training, fit

TARGET = 0.9  # ACC
EPOCHS = {"pretrain_epochs": 100, "clustering_epochs": 150}  # defaults of ClustPy's methods
SHARES = (0.1, 0.3, 1.0)  # of these, one after the other
METHODS = ("DDC", "DEC", "IDEC", "DCN")
PLANS = ("auto", "deepcluster")
SIDE, BATCH, WORKERS, IMAGES = 32, 256, 2, 10_000

Run = tuple[float, float]  # seconds, ACC
Pace = Callable[[], float]  # trains a few steps; seconds a step


def peers(device: torch.device = CPU, full: bool = False, data_root: str | None = None) -> Iterator[Case]:
    """ClustPy on digits, lightly on JPEGs.

    ``full``: three seeds, all of ClustPy's methods at all lengths, and 10,000 images of MNIST if ``data_root`` has it;
    else one seed, all methods at a tenth of their epochs, and at all of them the one that came nearest.
    """
    if there("clustpy"):
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        yield from race("digits", "digits", x, y, device, full)
        if full and (mnist := digits_of_mnist(data_root)):
            images, y = mnist
            yield from race("MNIST 10k", images, images.reshape(len(images), -1), y, device, full)
    if there("lightly"):
        yield from paces(device)


def there(package: str) -> bool:
    """Whether a peer can be imported; how to get it is said if not."""
    if find_spec(package):
        return True
    print(f"peers: {package} is not installed and left out: pip install 'deepcluster[bench]'", file=sys.stderr)
    return False


def digits_of_mnist(data_root: str | None) -> tuple[np.ndarray, np.ndarray] | None:
    """The first 10,000 images for training, (N, 28, 28) uint8, and their classes."""
    from torchvision.datasets import MNIST

    try:
        found = MNIST(data_root or Path.home() / ".cache/torchvision")
    except RuntimeError:
        print("peers: no MNIST there, left out: name the folder of torchvision's copy by --data-root", file=sys.stderr)
        return None
    return found.data[:IMAGES].numpy(), found.targets[:IMAGES].numpy()


def race(
    name: str, source: str | np.ndarray, x: np.ndarray, y: np.ndarray, device: torch.device, full: bool
) -> Iterator[Case]:
    """Seconds to an ACC of 0.9, and ACC when the best run of theirs was done, of each plan of ours.

    On the CPU one thread and its processor time for both sides, which other work disturbs least.
    """
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    x = ((x - x.mean()) / x.std()).astype(np.float32)
    ours: dict[str, list[list[Run]]] = {plan: [] for plan in PLANS}
    others: list[dict[str, list[Run]]] = []
    with threadpool_limits(1):
        for seed in range(3 if full else 1):
            for plan in PLANS:
                ours[plan].append(curve(plan, source, y, seed, device))
            others.append(lengths(x, y, seed, device, full))
    for plan, curves in ours.items():
        to, after = zip(*(compared(*pair) for pair in zip(curves, others, strict=True)), strict=True)
        missed = "" if any(reached(run)[1] for tried in others for run in tried.values()) else ", not reached"
        yield case(f"{name} to ACC {TARGET:.2f}, {plan}{missed}", "s", to, more=False)
        yield case(f"{name} ACC at the same time, {plan}", "ACC", after, more=True)


def curve(plan: str, source: str | np.ndarray, y: np.ndarray, seed: int, device: torch.device) -> list[Run]:
    """Ours, from nothing read to clusters: after every epoch what its images were seen as, at the end the clusters."""
    now, points = clock(device), []
    k = int(y.max()) + 1

    def look(report: Report) -> None:
        seconds = now() - began
        if not report.recipe.pretext:
            predicted = report.state.predicted[report.state.reported(report.recipe.rivals)].cpu().numpy()
            points.append((seconds, accuracy(predicted[predicted >= 0], y[predicted >= 0], k)))

    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, DEEPCLUSTER_CACHE=folder):
        began = now()
        settings = Settings(method=plan, n_clusters=k, seed=seed, device=device.type)
        result = runs.begin(settings, source, runs.Job(), hooks=(look,))
        return [*points, (now() - began, accuracy(result.images["cluster"].to_numpy(), y, k))]


def lengths(x: np.ndarray, y: np.ndarray, seed: int, device: torch.device, full: bool) -> dict[str, list[Run]]:
    """Whole runs of ClustPy's methods, each longer than the one before; none after one that reached the target."""
    tried: dict[str, list[Run]] = {method: [] for method in METHODS}
    for share in SHARES if full else (SHARES[0], SHARES[-1]):
        best = max(tried, key=lambda method: max((acc for _, acc in tried[method]), default=0))
        for method in METHODS if full or share == SHARES[0] else (best,):
            if not tried[method] or not reached(tried[method])[1]:
                tried[method].append(theirs(method, share, x, y, seed, device))
    return tried


def theirs(method: str, share: float, x: np.ndarray, y: np.ndarray, seed: int, device: torch.device) -> Run:
    """One run of ClustPy with a share of the epochs it has by default."""
    import clustpy.deep

    now, k = clock(device), int(y.max()) + 1
    asked = {name: round(share * epochs) for name, epochs in EPOCHS.items()} | {"n_clusters": k}
    if method == "DDC":  # finds how many, and does not train after its pretraining
        del asked["clustering_epochs"], asked["n_clusters"]
    with quiet():
        began = now()
        labels = getattr(clustpy.deep, method)(**asked, random_state=seed, device=device).fit(x).labels_
        return now() - began, accuracy(labels, y, k)


def compared(ours: list[Run], theirs: dict[str, list[Run]]) -> tuple[Run, Run]:
    """(seconds of ours, of theirs) to the target, (ACC of ours, of theirs) at one time; theirs is the best method.

    A side that does not reach the target counts with all its time: of theirs, that of the method that came nearest.
    """
    best = max(theirs.values(), key=lambda tried: max(acc for _, acc in tried))
    hits = [seconds for tried in theirs.values() for seconds, acc in tried if acc >= TARGET]
    seconds, acc = max(best, key=lambda run: run[1])
    ours_then = [a for s, a in ours if s <= seconds]
    return (reached(ours)[0], min(hits, default=best[-1][0])), (ours_then[-1] if ours_then else 0.0, acc)


def reached(points: list[Run]) -> tuple[float, bool]:
    """Seconds to the target, or all there are, and whether it was reached."""
    hit = [seconds for seconds, acc in points if acc >= TARGET]
    return (hit[0], True) if hit else (points[-1][0], False)


def accuracy(clusters: np.ndarray, y: np.ndarray, k: int) -> float:
    """ACC of any number of clusters."""
    return float(metrics.scores(clusters, y, k)["acc"] or 0)


def case(name: str, unit: str, pairs: Iterable[Run], *, more: bool, peer: str = "clustpy") -> Case:
    """Medians of both sides; ``more`` of the unit is better, or less."""
    ours, theirs = (np.array(side) for side in zip(*pairs, strict=True))
    ratios = ours / theirs if more else theirs / ours
    return {"case": name, "peer": peer, "ours": float(np.median(ours)), "unit": unit,
            "theirs": float(np.median(theirs)), "ratio": float(np.median(ratios)), "n": len(ratios),
            "low": float(ratios.min()), "high": float(ratios.max())}  # fmt: skip


def clock(device: torch.device) -> Callable[[], float]:
    """Processor seconds on the CPU, of the clock elsewhere, when all is done."""
    if device.type == "cpu":
        return time.process_time

    def now() -> float:
        finished(device)
        return time.perf_counter()

    return now


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """ClustPy prints every epoch and shows bars."""
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def paces(device: torch.device, rounds: int = 2, steps: int = 1) -> Iterator[Case]:
    """Images a second of training, from files or our store to the updated weights, on two threads.

    A round trains each side for one step that is not counted and then ``steps``, while its loader works on ahead. Each
    in fp32, both in bf16 (SimCLR only), and each as its examples or plans have it, which is fp32 beside bf16.
    """
    bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_bf16()
    torch.set_num_threads(WORKERS)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, DEEPCLUSTER_CACHE=f"{folder}/cache"):
        small_photographs(Path(folder) / "images")
        store = open_store(open_source(f"{folder}/images"), size=SIDE, channels=3, device=device, workers=WORKERS)
        for method in ("simclr", "swav"):
            kinds = [("fp32", False, False), ("bf16", True, True), ("defaults", True, False)]
            kinds = [kind for kind in kinds if bf16 or kind[0] == "fp32"][:: 1 if method == "simclr" else 2]
            sides = {("ours", own): our_pace(method, store, own, steps) for _, own, _ in kinds}
            sides |= {("theirs", other): their_pace(method, Path(folder) / "images", device, other, steps)
                      for _, _, other in kinds}  # fmt: skip
            rate: dict[tuple[str, bool], list[float]] = {side: [] for side in sides}
            for _ in range(rounds):
                for side, pace in sides.items():
                    rate[side].append(BATCH / pace())
            for name, own, other in kinds:
                pairs = zip(rate["ours", own], rate["theirs", other], strict=True)
                yield case(f"{method} resnet18, {name}", "images/s", pairs, more=True, peer="lightly")


class Enough(Exception):
    """Ends a training whose steps have been timed."""


def counted(batches: Iterable, steps: int, device: torch.device, times: list[float]) -> Iterator:
    """The batches; ``times`` gets the moment each is there. Ends after ``steps`` and one."""
    for batch in batches:
        finished(device)
        times.append(time.perf_counter())
        if len(times) == steps + 2:
            raise Enough
        yield batch


def timed(train: Callable[[list[float]], object], steps: int) -> float:
    """Seconds a step of a training, the first step left out."""
    times: list[float] = []
    with contextlib.suppress(Enough):
        train(times)
    return (times[-1] - times[1]) / steps


def our_pace(method: str, store: Store, bf16: bool, steps: int) -> Pace:
    """The loop of the package over its store; two crops of each image, as theirs."""
    params = {"n_clusters": 512, "overcluster": 1, "n_heads": 1, "first": "crop"} if method == "swav" else {}
    recipe = make_recipe(method, **params, view="crop")
    torch.manual_seed(0)
    model = Model(*make_backbone("resnet18", store.shape), recipe.heads, recipe.head)
    model = model.to(store.device).to(memory_format=torch.channels_last)
    training = Training(epochs=1, batch_size=BATCH, bf16=bf16)

    def train(times: list[float]) -> None:
        fit(model, store, recipe, training, progress=lambda batches: counted(batches, steps, store.device, times))

    return lambda: timed(train, steps)


def their_pace(method: str, images: Path, device: torch.device, bf16: bool, steps: int) -> Pace:
    """lightly's examples/pytorch/simclr.py and swav.py at 32 px, SwAV without its small crops."""
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss, SwaVLoss
    from lightly.models.modules import SimCLRProjectionHead, SwaVProjectionHead, SwaVPrototypes
    from lightly.transforms import SimCLRTransform, SwaVTransform

    torch.manual_seed(0)
    backbone = make_backbone("resnet18", (3, SIDE, SIDE))[0][1]  # normalising is part of their transform
    model: nn.Module
    if method == "simclr":
        transform = SimCLRTransform(input_size=SIDE, gaussian_blur=0.0)
        model, criterion = nn.Sequential(backbone, SimCLRProjectionHead(512, 512, 128)).to(device), NTXentLoss()
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    else:
        transform = SwaVTransform(crop_sizes=(SIDE, SIDE), crop_counts=(2, 0), gaussian_blur=0.0)
        model, criterion = nn.Sequential(backbone, SwaVProjectionHead(512, 512, 128)).to(device), SwaVLoss()
        prototypes = SwaVPrototypes(128, n_prototypes=512).to(device)
        optimizer = torch.optim.Adam([*model.parameters(), *prototypes.parameters()], lr=0.001)
    loader = torch.utils.data.DataLoader(LightlyDataset(str(images), transform=transform), BATCH, shuffle=True,
                                         drop_last=True, num_workers=WORKERS)  # fmt: skip

    def loss(views: list[Tensor]) -> Tensor:
        outputs = [model(view.to(device)) for view in views]
        if method == "simclr":
            return criterion(*outputs)
        return criterion([prototypes(nn.functional.normalize(z, dim=1)) for z in outputs], [])

    def train(times: list[float]) -> None:
        for views, _, _ in counted(loader, steps, device, times):
            if method == "swav":
                prototypes.normalize()
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                found = loss(views)
            found.backward()
            optimizer.step()
            optimizer.zero_grad()

    return lambda: timed(train, steps)


def small_photographs(root: Path) -> None:
    """10,000 JPEGs of 32 px in two folders: parts of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    rng, whole = np.random.default_rng(0), [Image.fromarray(pixels) for pixels in load_sample_images().images]
    for i in range(IMAGES):
        side = int(rng.integers(SIDE, 200))
        left, top = (int(rng.integers(0, most - side)) for most in whole[i % 2].size)
        folder = root / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        image = whole[i % 2].resize((SIDE, SIDE), Image.Resampling.BOX, (left, top, left + side, top + side))
        image.save(folder / f"{i:05}.jpg", quality=92)
