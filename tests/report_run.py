"""A finished run directory as the report reads it, small and made to order."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from deepcluster.backbones import make_backbone
from deepcluster.classifier import Classifier, Spec
from deepcluster.model import HEADS
from deepcluster.store import Store

HOSTILE = [
    '"><img src=x onerror=alert(1)>.png',
    "' onmouseover='alert(1).png",
    "</script><script>alert(1)</script>.png",
    "--><svg onload=alert(1)>.png",
    "<!-- <script>alert(1)//.png",
    "${script} $hash {0} %s &lt;b&gt; &amp;.png",
    "javascript:alert(1)",
    "two\nlines\ttab\u2028and\u2029more.png",
    "rtl \u202egnp.exe",
]


def plan_of(k=4, methods=("simclr", "iic"), shape=(3, 8, 8)):
    stages = [{"method": m, "params": {}, "epochs": 3, "batch_size": 8, "lr": 0.1} for m in methods]
    backbone = "convnet" if len(shape) == 3 else "mlp"
    return {"stages": stages, "n_clusters": k, "backbone": backbone, "weights": None, "init_from": None,
            "shape": list(shape), "seed": 5, "bf16": False}  # fmt: skip


def epochs(k=4, moved=0.93):
    pretext = [{"stage": 0, "epoch": e, "loss": 3.0 / e, "seconds": 1.5} for e in (1, 2, 3)]
    health = lambda e: {"active": k, "nmi_previous": None if e == 1 else moved}
    row = lambda e: {"stage": 1, "epoch": e, "loss": -0.1 * e, "seconds": 2.5, "health": health(e), "acc": 0.2 * e}
    return pretext + [row(e) for e in (1, 2, 3)]


def features_of(cluster, dim=6, seed=0):
    """Groups that are easy to tell apart."""
    rng = np.random.default_rng(seed)
    means = np.eye(int(cluster.max()) + 1, dim) * 4
    return (means[cluster] + rng.normal(size=(len(cluster), dim))).astype(np.float32)


def tables(n=60, k=4, names=None, cluster=None, ids=None, called=None, seed=0):
    """Columns of assignments and clusters; the i-th largest cluster has id ``ids[i]``, i unless given."""
    rng = np.random.default_rng(seed)
    cluster = np.sort(rng.integers(0, k, n)) if cluster is None else np.asarray(cluster)
    order = np.argsort(-np.bincount(cluster, minlength=k), kind="stable")
    ids = np.asarray(range(k) if ids is None else ids)
    cluster = ids[np.argsort(order)[cluster]]
    names = names or [f"in/{i:04d}.png" for i in range(n)]
    distance = rng.random(n).astype(np.float32)
    typical = np.zeros(n, bool)
    for c in np.unique(cluster):
        own = np.flatnonzero(cluster == c)
        typical[own[np.argsort(distance[own])][:9]] = True
    images = {
        "path": names,
        "sha1": [hashlib.sha1(repr(name).encode()).hexdigest() for name in names],
        "cluster": cluster,
        "probability": rng.random(n).astype(np.float32),
        "margin": rng.random(n).astype(np.float32),
        "distance": distance,
        "is_outlier": np.arange(n) % 7 == 0,
        "is_representative": typical,
    }
    called = called or {}
    used, sizes = np.unique(cluster, return_counts=True)
    base = {"cohesion": 0.9, "separation": 0.25}
    groups = [{"id": int(c), "name": called.get(int(c), ""), "size": int(m), **base}
              for c, m in zip(used, sizes, strict=True)]  # fmt: skip
    return images, groups


def a_run(folder: Path, n=60, k=4, *, plan=None, source="photos", data=None, metrics=None, images=None, groups=None,
          features=None, model=True, **more) -> Path:  # fmt: skip
    """Write it; ``images`` and ``groups`` change columns of ``tables(n, k, **more)``; returns the folder."""
    columns, rows = tables(n, k, **more)
    columns |= images or {}
    plan = plan or plan_of(k)
    (folder / "model").mkdir(parents=True)
    data = {"source": source, "data_root": None, "labels": "auto", "size": [8, 3], **(data or {})}
    (folder / "config.json").write_text(json.dumps({"version": "1.2.3", "data": data, "plan": plan}))
    lines = epochs(k) if metrics is None else metrics
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    pq.write_table(pa.table(columns), folder / "assignments.parquet")
    if any("is_junk" in one for one in (groups or {}).values()):
        rows = [one | {"is_junk": False} for one in rows]
    rows = [one | (groups or {}).get(one["id"], {}) for one in rows]
    pq.write_table(pa.Table.from_pylist(rows), folder / "clusters.parquet")
    place = np.unique(columns["cluster"], return_inverse=True)[1]
    np.save(folder / "features.npy", features_of(place, max(6, k)) if features is None else features)
    if model:
        classifier_of(k, tuple(plan["shape"])).save(folder / "model")
    return folder


def classifier_of(k=4, shape=(3, 8, 8), head="Linear"):
    torch.manual_seed(0)
    name = "convnet" if len(shape) == 3 else "mlp"
    backbone, dim = make_backbone(name, shape)
    return Classifier(Spec(name, shape, head, k, "0"), backbone, HEADS[head](dim, k), dim)


def plain_store(names, channels=3, size=8):
    """Image i is of one colour: (i % 256, 255 - i % 256, 128)."""
    i = torch.arange(len(names)) % 256
    colours = torch.stack([i, 255 - i, torch.full_like(i, 128)], 1).byte()[:, :channels]
    data = colours[:, :, None, None].expand(-1, -1, size, size).contiguous()
    sha1 = [hashlib.sha1(repr(name).encode()).hexdigest() for name in names]
    return Store(data, np.arange(len(names)), list(names), sha1, [], torch.device("cpu"), "memory")


N, K = 150, 3  # of the run that the browser opens
NAMES = tables(N, K)[0]["path"]
