"""Which backbone to use for these images, judged without labels: ``deepcluster advise SOURCE``.

Every backbone at hand sees the same images, as they are and through one augmented view. They are ordered by how
many images are found again: the nearest of all images to an image's crop is the image itself. Three more figures are
shown and decide nothing, since simple or collapsed features do well in them, too: how many of its neighbours an image
keeps when it is cropped, whether clusters found in one half of the images are those found in the other, and how many
directions the features use (RankMe, Garrido et al., 2023, arXiv:2210.02885; here the entropy is of variances).
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from deepcluster import dist, foreign, metrics, pretrained
from deepcluster.backbones import check_name, load_weights, make_backbone
from deepcluster.batches import eval_batches
from deepcluster.kmeans import nearest, tightest
from deepcluster.log import no_bar
from deepcluster.plan import Settings, choose_size
from deepcluster.sources import Source, open_source
from deepcluster.store import Store, open_store

NEAR = 10  # neighbours that should be kept
CLEARLY = 1.2  # so many times what an untrained network finds, and features are worth leaving as they are
CLUSTERS = 10  # of which stability is measured
UNTRAINED = ("convnet", "resnet18")  # what has learnt nothing is the yardstick
Progress = Callable[..., Iterable]


@dataclass(frozen=True)
class Candidate:
    """A backbone and the weights it starts from."""

    backbone: str
    weights: str | None = None

    def __str__(self) -> str:
        return f"{self.backbone}={self.weights}" if self.weights else self.backbone

    @property
    def trained(self) -> bool:
        return pretrained.brings(self.backbone, self.weights)


@dataclass(frozen=True)
class Score:
    """What its features are worth, all without labels.

    Attributes:
        found: share of images that are nearer to their augmented view than any other image is, in [0, 1].
        kept: share of an image's ``NEAR`` nearest neighbours that its augmented view has, too, in [0, 1].
        stable: adjusted Rand index of clusterings learnt on two halves of the images, at most 1.
        rank: directions that the features use, 1 to D: the exponential of the entropy of their variances.
    """

    found: float
    kept: float
    stable: float
    rank: float
    size: int
    dim: int


@torch.no_grad()
def embed(network: nn.Module, store: Store, view: str = "clean", progress: Progress = lambda it, **_: it) -> Tensor:
    """(N, D) features of a store's images through a view, on the CPU."""
    batches = progress(eval_batches(store, view, batch_size=64, shard=False), total=-(-len(store) // 64))
    return torch.cat([network(images).float().cpu() for images in batches])


def score(clean: Tensor, seen: Tensor, size: int) -> Score:
    """Judge features (N, D) of N images, and of one augmented view of each.

    Both are centred by the mean of the first and get unit length: what all images have in common tells none apart.

    Raises:
        ValueError: features that are not finite, or too few images.
    """
    n = len(clean)
    if n < 4 * NEAR:
        raise ValueError(f"advise needs at least {4 * NEAR} images; got {n}")
    if not (clean.isfinite().all() and seen.isfinite().all()):
        raise ValueError("it gives features that are NaN or infinite")
    mean = clean.mean(0)
    variances = torch.linalg.svdvals(clean - mean).square()
    share = variances / variances.sum().clamp_min(1e-12)
    x, v = (F.normalize(one - mean, dim=1) for one in (clean, seen))
    own, others = _near(x, x), _near(v, x)
    alike = v @ x.T
    others_best = alike.clone().fill_diagonal_(-torch.inf).amax(1)
    found = (alike.diagonal() > others_best).float().mean()
    kept = (own[:, :, None] == others[:, None]).any(2).float().mean()
    k = min(CLUSTERS, n // 20)
    stable = []
    for seed in range(3):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        halves = (tightest(x[part], k, seed=seed, restarts=3)[1] for part in order.chunk(2))
        stable.append(metrics.ari(*(nearest(x, centroids)[0].numpy() for centroids in halves)))
    rank = float(torch.special.entr(share).sum().exp())
    return Score(float(found), float(kept), float(np.median(stable)), rank, size, clean.shape[1])


def _near(x: Tensor, rows: Tensor) -> Tensor:
    """(N, NEAR) ids of the rows nearest to each x of the same images, the image's own row left out."""
    return (x @ rows.T).fill_diagonal_(-torch.inf).topk(NEAR, 1).indices


def at_hand() -> Iterator[Candidate]:
    """Backbones whose weights are on this machine: in torch.hub's folder, in $DEEPCLUSTER_WEIGHTS, in timm's cache."""
    from importlib.util import find_spec

    from torchvision import models

    if foreign.has_lite():
        yield Candidate(foreign.LITE)
    folders = [Path(torch.hub.get_dir()) / "checkpoints"]
    folders += [Path(own).expanduser()] if (own := os.environ.get("DEEPCLUSTER_WEIGHTS")) else []
    there = {path.name: str(path) for folder in folders if folder.is_dir() for path in sorted(folder.rglob("*.*"))}
    for name in models.list_models(module=models):
        for weights in models.get_model_weights(name):
            if file := there.get(weights.url.rpartition("/")[2]):
                yield Candidate(f"torchvision:{name}", file)
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "hub")
    cached = sorted(hub.expanduser().glob("models--timm--*/snapshots/*/model.safetensors")) if find_spec("timm") else []
    for file in [*map(str, cached), *(file for name, file in there.items() if name.endswith(".safetensors"))]:
        if "architecture" in (about := pretrained.beside(file)) or "backbone" in about:
            yield Candidate(file)


def parse(text: str) -> Candidate:
    """``NAME`` or ``NAME=FILE``, as the user gives it; trusted from now on.

    Raises:
        ValueError: there is no such backbone or file.
    """
    name, _, file = text.partition("=")
    check_name(name, file or None)
    pretrained.given(name)
    return Candidate(name, file or None)


def sample(source: Source, n: int) -> Source:
    """At most ``n`` images of a source, evenly spaced, and nothing else that it knows of them."""
    rows = np.linspace(0, len(source.names) - 1, min(n, len(source.names))).astype(int).tolist()
    signature = hashlib.sha1(f"{source.signature} {rows}".encode()).hexdigest()
    names = [source.names[row] for row in rows]
    return Source(source.location, names, lambda i: source.read(rows[i]), signature, [], None)


def judge(candidate: Candidate, source: Source, settings: Settings, device: torch.device, progress: Progress) -> Score:
    """Score one backbone on the images of a source; raises as ``make_backbone`` and ``score``."""
    size, channels = choose_size(settings, source, device)
    store = open_store(source, size=size, channels=channels, device=device, progress=progress)
    name, weights = pretrained.resolve(candidate.backbone, candidate.weights)
    mean, std = pretrained.normalisation(name, weights, store.shape) or store.statistics
    torch.manual_seed(0)
    network, _ = make_backbone(name, store.shape, mean, std, follows=bool(weights))
    if weights:
        load_weights(network, weights, name)
    network.to(device).eval()
    clean = embed(network, store, "clean", progress)
    return score(clean, embed(network, store, "strong" if channels == 1 else "crop", progress), size)


def advise(
    X: Any, backbones: Sequence[str] = (), n: int = 2000, device: str = "auto", data_root: str | None = None,
    quiet: bool = True,
) -> list[str]:  # fmt: skip
    """A table of the backbones at hand and those given (``NAME`` or ``NAME=FILE``), best first, and what to do.

    Those that cannot be used are listed with the reason.

    Raises:
        ValueError: the source holds features or too few images; a given backbone is not there.
    """
    if n < 4 * NEAR:
        raise ValueError(f"--n must be at least {4 * NEAR}; got {n}")
    mine = [parse(text) for text in backbones]
    source = open_source(X, data_root=data_root)
    if source.features is not None:
        raise ValueError(f"{source.location} holds features, which need no backbone; advise is for images")
    images, where = sample(source, n), dist.setup(device)
    found: dict[Candidate, Score] = {}
    failed = []
    for candidate in dict.fromkeys([*mine, *at_hand(), *(Candidate(name) for name in UNTRAINED)]):

        def progress(of: Any, candidate: Candidate = candidate, **kw: Any) -> Any:
            return tqdm(of, **{**kw, "desc": str(candidate)}, disable=no_bar(quiet), leave=False)

        try:
            settings = Settings(backbone=candidate.backbone, weights=candidate.weights)
            found[candidate] = judge(candidate, images, settings, where, progress)
        except ValueError as error:
            failed.append(f"{candidate}: left out: {error}")
    order = sorted(found, key=lambda one: -found[one].found)
    if not order:
        raise ValueError(f"no backbone could be judged; {failed[0]}")
    rows = [f"{'backbone':40} {'px':>4} {'D':>5} {'found':>6} {'kept':>6} {'stable':>7} {'rank':>6}"]
    for one in order:
        s = found[one]
        known = f"{one}" if one.trained else f"{one} (untrained)"
        rows.append(f"{known:40} {s.size:>4} {s.dim:>5} {s.found:>6.3f} {s.kept:>6.3f} {s.stable:>7.2f} {s.rank:>6.0f}")
    told = f"{len(images.names)} images, no labels; found: images that a crop of theirs leads back to (the order)"
    return [*rows, *failed, told, *verdict(found, source.location)]


def verdict(found: dict[Candidate, Score], source: str) -> list[str]:
    """What to do, and why: one sentence, and the command."""
    best = max(found, key=lambda one: found[one].found)
    base = max((s.found for one, s in found.items() if not one.trained), default=0.0)
    flags = f"--backbone {best.backbone}" + (f" --weights {best.weights}" if best.weights else "")
    share = f"{found[best].found:.0%} of the images are found again by a crop"
    if not best.trained:
        why = f"train {best} from scratch: {share}, and nothing pretrained at hand does better; look for such a network"
    elif found[best].found >= CLEARLY * base:
        why = (
            f"use {best}, frozen: {share}, {base:.0%} where nothing has been learnt, so its features serve as they are"
        )
        return [why, f"    deepcluster cluster {source} {flags} --out RUN"]
    else:
        why = f"use {best}, retrained: {share}, hardly more than where nothing has been learnt ({base:.0%})"
        flags += " --no-frozen"
    return [why, f"    deepcluster fit {source} {flags} --out RUN"]
