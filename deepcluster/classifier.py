"""What training leaves: a backbone, one head, and the order of its clusters. It labels any image, new or old.

Shapes: B or N images, D features, K clusters.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as deserialise
from safetensors.torch import save as serialise
from torch import Tensor, nn

from deepcluster.backbones import make_backbone
from deepcluster.batches import eval_batches
from deepcluster.model import HEADS, Model
from deepcluster.store import Store

FORMAT = 1


@dataclass(frozen=True)
class Spec:
    """What is needed to build the modules again; written to model/config.json."""

    backbone: str
    shape: tuple[int, ...]  # (C, H, W) of images, (D,) of vectors
    head: str  # a key of model.HEADS
    n_clusters: int
    version: str
    format: int = FORMAT


class Classifier(nn.Module):
    """Images -> clusters, sorted by their size in the training set: cluster 0 is the largest.

    Attributes:
        order: (K,) cluster c is output ``order[c]`` of the head.
        centroids: (K, D) mean unit feature of each cluster.
        reach: (K,) distance beyond which an image of this cluster is an outlier.
        names: of the clusters, "" until somebody names them.
    """

    def __init__(self, spec: Spec, backbone: nn.Module, head: nn.Module, dim: int):
        super().__init__()
        self.spec, self.dim, self.backbone, self.head = spec, dim, backbone, head
        k = spec.n_clusters
        self.order: Tensor
        self.centroids: Tensor
        self.reach: Tensor
        self.register_buffer("order", torch.arange(k))
        self.register_buffer("centroids", torch.zeros(k, dim))
        self.register_buffer("reach", torch.full((k,), float("inf")))
        self.names = [""] * k
        self.to(memory_format=torch.channels_last)  # as in training: another layout rounds differently

    @classmethod
    def of(cls, model: Model, head: int, spec: Spec, store: Store) -> tuple["Classifier", dict[str, np.ndarray]]:
        """Take one head of a trained model, sort its clusters by size, measure them on the training images.

        Returns:
            The classifier, and its predictions of the store's images (see ``predict``).
        """
        self = cls(spec, model.backbone, model.heads[head], model.dim).to(store.device)
        found = self.predict(store)
        sizes = np.bincount(found["cluster"], minlength=spec.n_clusters)
        order = np.argsort(-sizes, kind="stable")
        rank = np.argsort(order)
        self.order.copy_(torch.from_numpy(order))
        found["cluster"], found["second"] = rank[found["cluster"]], rank[found["second"]]
        found["probabilities"] = found["probabilities"][:, order]
        unit = F.normalize(torch.from_numpy(found["features"].astype(np.float32)), dim=1)
        which = torch.from_numpy(found["cluster"])
        total = torch.zeros(spec.n_clusters, self.dim).index_add_(0, which, unit)
        self.centroids.copy_(total / torch.bincount(which, minlength=spec.n_clusters).clamp_min(1)[:, None])
        found["distance"] = _distance(unit, self.centroids.cpu()[which]).numpy()
        for c in range(spec.n_clusters):  # Tukey's fence: far out is 1.5 interquartile ranges above the upper quartile
            inside = found["distance"][found["cluster"] == c]
            if len(inside):
                low, high = np.quantile(inside, [0.25, 0.75])
                self.reach[c] = float(high + 1.5 * (high - low))
        found["is_outlier"] = found["distance"] > self.reach.cpu().numpy()[found["cluster"]]
        return self, found

    @torch.no_grad()
    def predict(self, store: Store, batch_size: int = 512) -> dict[str, np.ndarray]:
        """Label every image of a store in float32; the batch size changes nothing but rounding.

        Returns:
            Arrays of N: ``cluster`` int64, ``probability`` of it, ``second`` most likely cluster, ``margin``
            between the two probabilities, cosine ``distance`` in [0, 2] to the cluster's mean, ``is_outlier``;
            ``probabilities`` (N, K) and ``features`` (N, D) float32.

        Raises:
            ValueError: the images have another shape than those it was trained on.
        """
        if store.shape != self.spec.shape:
            raise ValueError(f"the model was trained on images of shape {self.spec.shape}; got {store.shape}")
        self.eval()
        features, probabilities = [], []
        for images in eval_batches(store, batch_size=batch_size, shard=False):
            f = self.backbone(images)
            features.append(f.float().cpu())
            probabilities.append(self.head(f).float().softmax(1).cpu())
        f, p = torch.cat(features), torch.cat(probabilities)
        top = p.topk(2, dim=1)  # before the order is applied, so that a tie falls the same way before and after it
        cluster, second = self.order.argsort().cpu()[top.indices].T
        p = p[:, self.order.cpu()]
        distance = _distance(F.normalize(f, dim=1), self.centroids.cpu()[cluster])
        return {
            "cluster": cluster.numpy(),
            "probability": top.values[:, 0].numpy(),
            "second": second.numpy(),
            "margin": (top.values[:, 0] - top.values[:, 1]).numpy(),
            "distance": distance.numpy(),
            "is_outlier": (distance > self.reach.cpu()[cluster]).numpy(),
            "probabilities": p.numpy(),
            "features": f.numpy(),
        }

    def save(self, folder: Path) -> None:
        """Write model.safetensors, config.json and names.json; no code travels."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        texts = {"config.json": asdict(self.spec), "names.json": self.names}
        written = {name: (json.dumps(value, indent=2) + "\n").encode() for name, value in texts.items()}
        for name, data in {"model.safetensors": serialise(weights), **written}.items():
            tmp = folder / f"{name}.tmp"
            tmp.write_bytes(data)
            tmp.replace(folder / name)

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "Classifier":
        """Read what ``save`` wrote; executes nothing.

        Raises:
            ValueError: no model there, a damaged one, or one of a newer version.
        """
        try:
            config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if config["format"] > FORMAT:
                raise ValueError(f"it has format {config['format']}, this version reads {FORMAT}; upgrade deepcluster")
            spec = Spec(**{**config, "shape": tuple(config["shape"])})
            backbone, dim = make_backbone(spec.backbone, spec.shape)
            self = cls(spec, backbone, HEADS[spec.head](dim, spec.n_clusters), dim)  # type: ignore[arg-type]
            self.load_state_dict(deserialise((folder / "model.safetensors").read_bytes()))
            self.names = [str(name) for name in json.loads((folder / "names.json").read_text(encoding="utf-8"))]
        except FileNotFoundError as error:
            raise ValueError(f"no model in {folder}: {Path(error.filename).name} is missing") from None
        except (KeyError, TypeError, RuntimeError, AttributeError, SafetensorError, ValueError) as error:
            reason = " ".join((str(error) or type(error).__name__).split())[:200]
            raise ValueError(f"cannot read the model in {folder}: {reason}") from error
        return self.to(device)


def _distance(unit: Tensor, centroids: Tensor) -> Tensor:
    """(B,) cosine distance of unit features to (B, D) centroids."""
    return 1 - (unit * F.normalize(centroids, dim=1)).sum(1)
