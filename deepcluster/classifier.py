"""What training leaves: a backbone, one head, and the order of its clusters. It labels any image, new or old.

Shapes: B or N images, D features, K clusters of the head, K' ids: K and those that edits added.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from safetensors.torch import save as serialise
from torch import Tensor, nn

from deepcluster import atomic, checked, confidence, edits, frozen, metrics
from deepcluster.backbones import make_backbone
from deepcluster.batches import eval_batches, joined
from deepcluster.edits import Step, distance
from deepcluster.model import HEADS
from deepcluster.store import Store

FORMAT = 1
ROWS = 512  # images at a time
COLUMNS = ("cluster", "probability", "second", "margin", "distance", "is_outlier", "confidence")
MEASURED = ("centroids", "reach", "trust")  # of the clusters, anew after each edit


@dataclass(frozen=True)
class Spec:
    """What is needed to build the modules again; written to model/config.json."""

    backbone: str
    shape: tuple[int, ...]  # (C, H, W) of images, (D,) of vectors
    head: str  # a key of model.HEADS
    n_clusters: int
    version: str
    format: int = FORMAT
    frozen: int = 0  # what heads see of a network that stays as it was has so many dimensions; 0: it was trained


class Classifier(nn.Module):
    """Images -> clusters, sorted by their size in the training set: cluster 0 is the largest, until they are edited.

    Attributes:
        order: (K,) cluster c is output ``order[c]`` of the head.
        centroids: (K', D) mean unit feature of each cluster.
        reach: (K',) distance beyond which an image of this cluster is an outlier.
        trust: (2,) how probabilities become confidence, see ``confidence.measure``.
        names: K', "" until somebody names a cluster.
        junk: ids that somebody marked as junk.
        steps: the edits, in order.
    """

    def __init__(self, spec: Spec, backbone: nn.Module, head: nn.Module, dim: int):
        super().__init__()
        self.spec, self.dim, self.backbone, self.head, k = spec, dim, backbone, head, spec.n_clusters
        self.order: Tensor
        self.centroids: Tensor
        self.reach: Tensor
        self.trust: Tensor
        self.register_buffer("order", torch.arange(k))
        self.register_buffer("centroids", torch.zeros(k, dim))
        self.register_buffer("reach", torch.full((k,), float("inf")))
        self.register_buffer("trust", confidence.unknown())
        self.first_names = [""] * k
        self.steps: list[Step] = []
        self.trained: dict[str, Tensor] = {}  # MEASURED before the first edit
        self._count()
        self.to(memory_format=torch.channels_last).eval()  # as in training: another layout rounds differently

    def _count(self) -> None:
        self.ids = edits.ids_after(self.first_names, self.steps)

    @property
    def n_clusters(self) -> int:
        """K': ids that were ever given, those gone by a merge among them."""
        return self.ids.total

    @property
    def names(self) -> list[str]:
        """Of every id; "" without a name."""
        return self.ids.names

    @property
    def measured(self) -> dict[str, Tensor]:
        """MEASURED."""
        return {name: getattr(self, name) for name in MEASURED}

    @property
    def junk(self) -> set[int]:
        """Ids marked as junk."""
        return self.ids.junk

    @torch.no_grad()
    def sort(self, features: np.ndarray, names: Sequence[str], steps: Sequence[Step],
             looks: Tensor | None = None) -> dict[str, np.ndarray]:  # fmt: skip
        """Number the clusters by size, measure them on the training images' features (N, D); gives ``describe``.

        ``names`` of the head's outputs, if any; ``steps``: edits made already; ``looks``: see ``confidence.measure``.
        """
        sizes = torch.bincount(self._clusters(features), minlength=self.spec.n_clusters).cpu().numpy()
        self.order.copy_(torch.from_numpy(np.argsort(-sizes, kind="stable")))
        self.name(names)
        self._measure(features, looks)
        if steps:
            self._set(steps, features)
        return self.describe(features)

    def name(self, names: Sequence[str]) -> None:
        """Give clusters the ``names`` of the head's outputs, if these have any."""
        self.first_names = [names[output] for output in self.order.tolist()] if names else self.first_names
        self._count()

    def _parts(self, features: np.ndarray) -> Iterator[Tensor]:
        """(N, D) features, ROWS at a time, on the device."""
        for start in range(0, len(features), ROWS):
            yield torch.from_numpy(np.array(features[start : start + ROWS], np.float32)).to(self.order.device)

    def _clusters(self, features: np.ndarray) -> Tensor:
        """(N,) ids as the clusters are now."""
        cluster = torch.empty(len(features), dtype=torch.int64, device=self.order.device)
        for here, part in zip(cluster.split(ROWS), self._parts(features), strict=True):
            here.copy_(self.judge(part)[1])
        return cluster

    @torch.no_grad()
    def _measure(self, features: np.ndarray, looks: Tensor | None = None) -> None:
        """MEASURED of the clusters as they are now, from the features (N, D) of the training images."""
        k, device = self.n_clusters, self.order.device
        cluster = self._clusters(features)
        total = torch.zeros(k, self.dim, device=device)
        for part, which in zip(self._parts(features), cluster.split(ROWS), strict=True):
            total.index_add_(0, which, F.normalize(part, dim=1))
        self.centroids = total / torch.bincount(cluster, minlength=k).clamp_min(1)[:, None]
        far = torch.empty(len(features), device=device)
        for part, which, here in zip(self._parts(features), cluster.split(ROWS), far.split(ROWS), strict=True):
            here.copy_(distance(F.normalize(part, dim=1), self.centroids[which]))
        self.reach = torch.from_numpy(metrics.fences(far.cpu().numpy(), cluster.cpu().numpy(), k)).to(device)
        self.trust = confidence.measure(self.judge, features, self.trust, looks)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, H, W) in [0, 1], or vectors (B, D) -> features (B, D), probabilities (B, K'), ids (B,)."""
        features = self.backbone(images).float()
        return features, *self.judge(features)

    def judge(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D) -> probabilities (B, K'), ids (B,).

        The id is that of the largest probability, unless an edit moved the image: a merge moves none but its own.
        """
        p = self.head(features).float().softmax(1)
        cluster = self.order.argsort()[p.argmax(1)]  # before the order is applied: ties fall alike before and after it
        p, unit = p[:, self.order], F.normalize(features, dim=1)
        for step in self.steps:
            for edit in step.edits:
                cluster, p = edit.apply(unit, cluster, p)
        return p, cluster

    def _columns(self, features: Tensor, p: Tensor, cluster: Tensor) -> dict[str, np.ndarray]:
        own = p.gather(1, cluster[:, None])[:, 0]
        others = p.scatter(1, cluster[:, None], -1.0)
        others[:, sorted(self.ids.gone)] = -1.0
        best = others.max(1)
        alone = best.values < 0
        far = distance(F.normalize(features, dim=1), self.centroids[cluster])
        sure = confidence.of(p, cluster, self.trust)
        second = torch.where(alone, -1, best.indices)
        margin = torch.where(alone, own, own - best.values)
        columns = (cluster, own, second, margin, far, far > self.reach[cluster], sure)
        return {name: column.cpu().numpy() for name, column in zip(COLUMNS, columns, strict=True)}

    @torch.no_grad()
    def describe(self, features: np.ndarray) -> dict[str, np.ndarray]:
        """COLUMNS, and ``features`` themselves, of images whose features (N, D) are there already."""
        parts = (self._columns(part, *self.judge(part)) for part in self._parts(features))
        return {**joined(parts, len(features)), "features": features}

    @torch.no_grad()
    def stream(self, store: Store, batch_size: int = ROWS) -> Iterator[dict[str, np.ndarray]]:
        """Label the images of a store in order, in float32; the batch size changes nothing but rounding.

        Yields:
            For each batch, arrays of B: ``cluster`` int64, ``probability`` of it, ``second`` most likely cluster (-1
            if there is no other), ``margin`` between the two probabilities (negative only where an edit moved the
            image), cosine ``distance`` in [0, 2] to the cluster's mean, ``is_outlier``, ``confidence`` in [0, 1];
            ``probabilities`` (B, K') and ``features`` (B, D) float32.

        Raises:
            ValueError: the images have another shape than those it was trained on.
        """
        if store.shape != self.spec.shape:
            raise ValueError(f"the model was trained on images of shape {self.spec.shape}; got {store.shape}")
        batch_size = min(batch_size, frozen.ROWS) if self.spec.frozen else batch_size
        for images in eval_batches(store, batch_size=batch_size, shard=False):
            n = len(images)
            if images.ndim == 2:  # a small batch is summed in another order; vectors are cheap enough to fill it up
                images = F.pad(images, (0, 0, 0, batch_size - n))
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # float32 has 24 bits, TF32 has 11
                features, p, cluster = (column[:n] for column in self(images))
            more = {"probabilities": p.cpu().numpy(), "features": features.cpu().numpy()}
            yield self._columns(features, p, cluster) | more

    def predict(
        self, store: Store, columns: Sequence[str] = (*COLUMNS, "probabilities", "features"), batch_size: int = ROWS
    ) -> dict[str, np.ndarray]:
        """The named columns of ``stream`` for all images of a store."""
        parts = ({name: found[name] for name in columns} for found in self.stream(store, batch_size))
        return joined(parts, len(store))

    def edit(self, features: np.ndarray, step: Step) -> dict[str, np.ndarray]:
        """Change the clusters, measure them anew on the features (N, D) of the training images; gives ``describe``.

        Raises:
            ValueError: a cluster does not exist, or the change makes no sense; nothing was changed then.
        """
        edits.ids_after(self.first_names, [*self.steps, step])
        self._set([*self.steps, step], features)
        return self.describe(features)

    def undo(self, features: np.ndarray) -> dict[str, np.ndarray]:
        """Take the last step back; returns as ``edit``. Raises a ValueError if there is none."""
        if not self.steps:
            raise ValueError("there is no edit to undo")
        self._set(self.steps[:-1], features)
        return self.describe(features)

    def _set(self, steps: Sequence[Step], features: np.ndarray) -> None:
        self.trained = self.trained or self.measured
        self.steps = list(steps)
        self._count()
        if self.steps:
            self._measure(features)
        else:
            self.centroids, self.reach, self.trust = (self.trained[name].to(self.order.device) for name in MEASURED)

    def split(self, features: np.ndarray, cluster: int, parts: int) -> edits.Split:
        """The edit that splits a cluster by the features (N, D) of the training images; raises as ``edits.split``."""
        self.ids.check(cluster)
        rows = np.flatnonzero(self._clusters(features).cpu().numpy() == cluster)
        return edits.split(cluster, torch.from_numpy(np.array(features[rows], np.float32)), parts)

    def nearest(self) -> edits.Nearest:
        """The edit that moves outliers to the cluster whose mean is nearest."""
        return edits.Nearest(self.centroids, self.reach)

    def save(self, folder: Path) -> None:
        """Write model.safetensors, config.json, names.json and, if there are edits, edits.safetensors; no code."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {k: v.detach().cpu().contiguous() for k, v in (self.state_dict() | self.trained).items()}
        atomic.write(folder / "model.safetensors", serialise(weights))
        atomic.write_json(folder / "config.json", asdict(self.spec))
        for name, data in self.edit_files().items():
            if self.steps or name != "edits.safetensors" or (folder / name).exists():
                atomic.write(folder / name, data)

    def edit_files(self) -> dict[str, bytes]:
        """What changes with an edit: the names, and the edits themselves, an empty log if all were undone."""
        packed = edits.pack(self.first_names, self.steps, self.measured)
        return {"names.json": (json.dumps(self.names, indent=2) + "\n").encode(), "edits.safetensors": packed}

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "Classifier":
        """Read what ``save`` wrote; executes nothing.

        Raises:
            ValueError: no model there, a damaged one, or one of a newer version.
        """
        try:
            config = checked.version(json.loads((folder / "config.json").read_text(encoding="utf-8")), FORMAT)
            spec = Spec(**{**config, "shape": checked.shape(config["shape"])})
            weights = deserialise((folder / "model.safetensors").read_bytes())

            def build() -> Classifier:
                made = make_backbone(spec.backbone, spec.shape, *checked.seen(weights, spec.shape), follows=True)
                backbone, dim = frozen.around(*made, spec.frozen)
                return cls(spec, backbone, HEADS[spec.head](dim, spec.n_clusters), dim)  # type: ignore[arg-type]

            self = checked.built(folder / "model.safetensors", spec.n_clusters, build)
            self.load_state_dict({"trust": self.trust} | {n: x for n, x in weights.items() if n != "certainty"})
            names = json.loads((folder / "names.json").read_text(encoding="utf-8"))
            if (folder / "edits.safetensors").exists():
                self.trained = self.measured
                names, self.steps, measured = edits.unpack(folder / "edits.safetensors")
                self.centroids, self.reach = measured["centroids"], measured["reach"]
                self.trust = measured.get("trust", confidence.unknown())
            self.first_names = [str(name) for name in names]
            self._count()
            if [one.shape for one in self.measured.values()] != [(k := self.n_clusters, self.dim), (k,), (2,)]:
                raise ValueError("its names or edits belong to another model")
            self.judge(torch.zeros(1, self.dim))  # so do edits of another width
        except FileNotFoundError as error:
            raise ValueError(f"no model in {folder}: {Path(error.filename).name} is missing") from None
        except (LookupError, TypeError, RuntimeError, AttributeError, SafetensorError, ValueError) as error:
            reason = " ".join((str(error) or type(error).__name__).split())[:200]
            raise ValueError(f"cannot read the model in {folder}: {reason}") from error
        return self.to(device)
