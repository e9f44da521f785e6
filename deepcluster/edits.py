"""What people change about clusters after training: merged, split, named, set aside as junk, outliers moved.

An edit is a function of an image's features and probabilities, so that new images obey it as the old ones do. Ids are
stable: a merge keeps the smallest id and leaves holes, a split adds ids at the end. The edits of a model, in order, are
its undo log.

Shapes: B images, D features, K ids so far.
"""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from deepcluster.kmeans import tightest

FORMAT = 1


@dataclass
class Ids:
    """The ids there are: how many were ever given, which are gone, what they are called, which are junk."""

    total: int
    names: list[str]
    gone: set[int] = field(default_factory=set)
    junk: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return self.total - len(self.gone)

    def check(self, *clusters: int) -> None:
        """Raise a ValueError that names the clusters there are, unless all of these exist."""
        for c in clusters:
            if not 0 <= c < self.total or c in self.gone:
                raise ValueError(f"there is no cluster {c}; there are {_ranges(set(range(self.total)) - self.gone)}")


def _ranges(ids: Iterable[int]) -> str:
    """{0, 1, 2, 5} -> "0-2, 5"."""
    runs: list[list[int]] = []
    for c in sorted(ids):
        if runs and c == runs[-1][1] + 1:
            runs[-1][1] = c
        else:
            runs.append([c, c])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


@dataclass(frozen=True)
class Edit:
    """One change. ``apply`` uses torch operations only, so that a model with edits can be exported."""

    tensors: ClassVar[tuple[str, ...]] = ()  # fields that are tensors: kept apart from the words

    def record(self, ids: Ids) -> None:
        """What it does to the ids, nothing by default; raises a ValueError if it cannot be."""

    def apply(self, unit: Tensor, cluster: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features (B, D), ids (B,), probabilities (B, K) -> ids and probabilities (B, K or more)."""
        return cluster, p

    def words(self) -> dict[str, Any]:
        """For JSON."""
        said = {name: value for name, value in vars(self).items() if name not in self.tensors}
        return {"edit": type(self).__name__.lower(), **said}


@dataclass(frozen=True)
class Merge(Edit):
    """Several clusters become one, under their smallest id. Its probability is their sum; no other image moves."""

    clusters: tuple[int, ...]

    def record(self, ids: Ids) -> None:
        """The larger ids are gone; the merged cluster keeps the first name there is."""
        ids.check(*self.clusters)
        if len(set(self.clusters)) < 2:
            raise ValueError(f"a merge needs two different clusters or more; got {list(self.clusters)}")
        kept, *gone = sorted(set(self.clusters))
        ids.names[kept] = next((ids.names[c] for c in (kept, *gone) if ids.names[c]), "")
        ids.gone |= set(gone)
        ids.junk -= set(gone)

    def apply(self, unit: Tensor, cluster: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """As described above."""
        to = torch.arange(p.shape[1], device=p.device)
        to[list(self.clusters)] = min(self.clusters)
        return to[cluster], torch.zeros_like(p).index_add(1, to, p)


@dataclass(frozen=True)
class Split(Edit):
    """One cluster becomes several: each image goes to the nearest of ``centroids`` (n, D), with the whole probability.

    The first part keeps the id, the others get new ones.
    """

    cluster: int
    centroids: Tensor
    tensors: ClassVar[tuple[str, ...]] = ("centroids",)

    def record(self, ids: Ids) -> None:
        """New ids at the end; junk stays junk."""
        ids.check(self.cluster)
        new = range(ids.total, ids.total + len(self.centroids) - 1)
        ids.total += len(new)
        ids.names += ["" for _ in new]
        ids.junk |= set(new) if self.cluster in ids.junk else set()

    def apply(self, unit: Tensor, cluster: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """As described above."""
        parts = self.centroids.to(unit.device)
        ids = torch.arange(len(parts), device=p.device) + p.shape[1] - 1
        ids[0] = self.cluster
        to = ids[(unit @ F.normalize(parts, dim=1).T).argmax(1)]
        whole = p[:, self.cluster, None]
        kept = torch.arange(p.shape[1], device=p.device) != self.cluster
        p = torch.cat([p * kept, p.new_zeros(p.shape[0], len(parts) - 1)], 1)
        return torch.where(cluster == self.cluster, to, cluster), p.scatter_add(1, to[:, None], whole)


def split(cluster: int, features: Tensor, parts: int) -> Split:
    """Split a cluster by k-means on the features (B, D) of its images; the largest part keeps the id.

    Raises:
        ValueError: fewer than 2 ``parts``, or fewer different images than parts.
    """
    if not 2 <= parts <= len(features):
        raise ValueError(f"cluster {cluster} has {len(features)} images; split it into 2 to {len(features)} parts, "
                         f"not {parts}")  # fmt: skip
    labels, centroids = tightest(F.normalize(features, dim=1), parts, seed=0, restarts=5)
    sizes = torch.bincount(labels, minlength=parts)
    if not sizes.all():
        raise ValueError(f"cluster {cluster} has fewer than {parts} different images; split it into fewer parts")
    return Split(cluster, centroids[sizes.argsort(descending=True, stable=True)])


@dataclass(frozen=True)
class Nearest(Edit):
    """Outliers, images beyond ``reach`` (K,) of their cluster, go to the cluster with the nearest of ``centroids``.

    Rows of clusters that must get none are zero. Probabilities stay as they are.
    """

    centroids: Tensor  # (K, D)
    reach: Tensor
    tensors: ClassVar[tuple[str, ...]] = ("centroids", "reach")

    def apply(self, unit: Tensor, cluster: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """As described above."""
        centroids = F.normalize(self.centroids.to(unit.device), dim=1)
        far = distance(unit, centroids[cluster]) > self.reach.to(unit.device)[cluster]
        usable = centroids.square().sum(1) > 0
        near = (unit @ centroids.T).masked_fill(~usable, -2).argmax(1)
        return torch.where(far, near, cluster), p


@dataclass(frozen=True)
class Name(Edit):
    """A cluster is called something; "" takes the name away."""

    cluster: int
    name: str

    def record(self, ids: Ids) -> None:
        """One name changes."""
        ids.check(self.cluster)
        try:
            self.name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"the name {self.name!r} cannot be written as UTF-8; use other letters") from None
        ids.names[self.cluster] = self.name


@dataclass(frozen=True)
class Junk(Edit):
    """A cluster holds nothing of interest: it keeps its images, and whoever reads the results can leave it out."""

    cluster: int
    junk: bool = True

    def record(self, ids: Ids) -> None:
        """It is marked, or no longer."""
        ids.check(self.cluster)
        (ids.junk.add if self.junk else ids.junk.discard)(self.cluster)


@dataclass(frozen=True)
class Recut(Edit):
    """All clusters anew: ``groups`` (M,), 0 to k - 1, of small clusters with ``centroids`` (M, D); see ``recut``.

    An image belongs to a small cluster with a probability in proportion to exp(``scale`` * cosine), to a group with the
    sum of these. Ids, names and junk begin anew; those of before are back when it is undone.
    """

    centroids: Tensor
    groups: tuple[int, ...]
    scale: float
    tensors: ClassVar[tuple[str, ...]] = ("centroids",)

    def record(self, ids: Ids) -> None:
        """As many ids as there are groups."""
        if not self.groups or set(self.groups) != set(range(len(set(self.groups)))):
            raise ValueError("the groups of a cut must be numbered 0, 1, 2 and so on")
        ids.total = max(self.groups) + 1
        ids.names, ids.gone, ids.junk = [""] * ids.total, set(), set()

    def apply(self, unit: Tensor, cluster: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """As described above."""
        near = (self.scale * unit @ F.normalize(self.centroids.to(unit.device), dim=1).T).softmax(1)
        to = torch.tensor(self.groups, device=unit.device)
        p = near.new_zeros(near.shape[0], max(self.groups) + 1).index_add(1, to, near)
        return p.argmax(1), p


KINDS: dict[str, type[Edit]] = {kind.__name__.lower(): kind for kind in (Merge, Split, Nearest, Name, Junk, Recut)}


@dataclass(frozen=True)
class Step:
    """Edits made, and undone, together."""

    edits: tuple[Edit, ...]
    when: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S"))

    def words(self) -> dict[str, Any]:
        """For JSON."""
        return {"when": self.when, "edits": [edit.words() for edit in self.edits]}


def ids_after(names: Sequence[str], steps: Iterable[Step]) -> Ids:
    """The ids after all steps, from the names at the start; raises a ValueError at the first edit that cannot be."""
    ids = Ids(len(names), list(names))
    for step in steps:
        for edit in step.edits:
            edit.record(ids)
    return ids


def distance(unit: Tensor, centroids: Tensor) -> Tensor:
    """(B,) cosine distance of unit features to centroids (B, D)."""
    return 1 - (unit * F.normalize(centroids, dim=1)).sum(1)


def pack(names: Sequence[str], steps: Sequence[Step], measured: dict[str, Tensor]) -> bytes:
    """The undo log as one safetensors file: words in its metadata, tensors as tensors; with the names at the start."""
    tensors = dict(measured)
    for i, step in enumerate(steps):
        tensors |= {f"{i}.{j}.{name}": getattr(e, name) for j, e in enumerate(step.edits) for name in e.tensors}
    words = {"format": FORMAT, "names": list(names), "steps": [step.words() for step in steps]}
    kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return serialise(kept, metadata={"edits": json.dumps(words)})


def unpack(file: Path) -> tuple[list[str], list[Step], dict[str, Tensor]]:
    """What ``pack`` wrote.

    Raises:
        ValueError: it is damaged, or of a newer version.
    """
    try:
        with safe_open(file, "pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (no mapping)
            words = json.loads(stored.metadata()["edits"])
        if words["format"] > FORMAT:
            raise ValueError(f"it has format {words['format']}, this version reads {FORMAT}; upgrade deepcluster")
        steps = []
        for i, step in enumerate(words["steps"]):
            made = []
            for j, said in enumerate(step["edits"]):
                kind = KINDS[said.pop("edit")]
                own = {name: tensors.pop(f"{i}.{j}.{name}") for name in kind.tensors}
                made.append(kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in said.items()}, **own))
            steps.append(Step(tuple(made), step["when"]))
        return [str(name) for name in words["names"]], steps, tensors
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        reason = " ".join((str(error) or type(error).__name__).split())[:160]
        raise ValueError(f"cannot read {file}: {reason}") from None
