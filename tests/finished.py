"""A finished run without training: an untrained network whose clusters are spread over real images."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tiny import classified

import deepcluster.methods  # noqa: F401
from deepcluster import atomic, outputs, plan, results
from deepcluster.backbones import make_backbone
from deepcluster.classifier import Classifier, Spec
from deepcluster.edits import Step
from deepcluster.model import Model
from deepcluster.settings import Settings
from deepcluster.sources import open_source
from deepcluster.store import open_store

CPU = torch.device("cpu")


def finished(run: Path, source: str, k: int = 3, size: int = 8, channels: int = 1, backbone: str = "convnet") -> Path:
    """Write all of a run directory that is read later; ``source`` is taken from the working directory."""
    opened = open_source(source)
    store = open_store(opened, size=size, channels=channels)
    backbone = "mlp" if opened.features is not None else backbone
    torch.manual_seed(0)
    made = Model(*make_backbone(backbone, store.shape), (k,), torch.nn.Linear)
    rows = torch.arange(len(store))
    x = store.take(rows) / 255 if store.data.ndim == 4 else store.take(rows)
    with torch.no_grad():
        made.heads[0].weight *= 20
        z = made.eval()([x])[0][0]
        made.heads[0].bias -= z.mean(0) + torch.linspace(0, 0.3, k)
    classifier, found = classified(made, Spec(backbone, store.shape, "Linear", k, "0"), store)
    known = {"reason": pa.array([""] * len(store)), "duplicate_of": pa.array([None] * len(store), pa.string())}
    run.mkdir(parents=True)
    results.write(run, classifier, found, results.training_images(found, store.names, store.sha1, classifier, known))
    chosen = plan.resolve(Settings(n_clusters=k, method="iic", epochs=1, batch_size=8), len(store), store.shape, CPU)
    data = {"source": os.fspath(source), "cwd": str(Path.cwd()), "data_root": None, "size": [size, channels],
            "labels": "none"}  # fmt: skip
    atomic.write_json(run / "config.json", {"data": data, "plan": chosen.to_dict()})
    return run


def edit(run: Path, *made) -> Classifier:
    """Change the clusters of such a run, as the command line does."""
    classifier, features = Classifier.load(run / "model", CPU), np.load(run / "features.npy")
    found = classifier.edit(features, Step(made, "2026-01-01T00:00:00"))
    table = results.edited(outputs.read_assignments(run), classifier, found)
    results.rewrite(run, classifier, found, table)
    return classifier
