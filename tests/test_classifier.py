"""What training leaves: ids by size, alike before and after the order is applied, saved and read without a change."""

import numpy as np
import pytest
import torch
from tiny import classified, tiny_store

from deepcluster.backbones import make_backbone
from deepcluster.classifier import Classifier, Spec
from deepcluster.model import Model

SPEC = Spec("convnet", (1, 8, 8), "Linear", 4, "0")


@pytest.fixture
def made():
    torch.manual_seed(0)
    backbone, dim = make_backbone("convnet", (1, 8, 8))
    model, store = Model(backbone, dim, (4,), torch.nn.Linear), tiny_store()
    with torch.no_grad():  # spread the images over the clusters, unevenly
        z = model.eval()([store.data / 255])[0][0]
        model.heads[0].bias -= z.mean(0) + torch.tensor([0.02, 0.0, 0.01, 0.0])
    return *classified(model, SPEC, store), store


def test_ids_by_size_and_the_same_by_predict(made):
    classifier, found, store = made
    sizes = np.bincount(found["cluster"], minlength=4)
    assert list(sizes) == sorted(sizes, reverse=True)
    assert (sizes > 0).sum() > 1
    again = classifier.predict(store)
    for name, value in found.items():
        assert np.allclose(again[name], value, atol=1e-5), name
    p = again["probabilities"]
    assert np.array_equal(p.argmax(1), again["cluster"]), "columns are not in the order of ids"
    assert np.array_equal(np.sort(p, 1)[:, -1], again["probability"])
    assert np.allclose(again["margin"], np.diff(np.sort(p, 1)[:, -2:])[:, 0])
    assert np.array_equal(p[np.arange(len(store)), again["second"]], np.sort(p, 1)[:, -2])
    assert np.allclose(p.sum(1), 1, atol=1e-6)


def test_ties_fall_the_same_way_before_and_after_sorting():
    class Tied(torch.nn.Linear):
        """Outputs 1 and 3 always tie; 1 wins on few images, so that sorting puts it behind 3's rivals."""

        def forward(self, features):
            z = torch.zeros(*features.shape[:-1], 4)
            z[..., 1] = z[..., 3] = 1
            z[..., 2] = 2.0 * (torch.arange(len(z)) % 3 > 0)
            return z

    backbone, dim = make_backbone("convnet", (1, 8, 8))
    classifier, found = classified(Model(backbone, dim, (4,), Tied), SPEC, store := tiny_store())
    assert np.array_equal(found["cluster"], classifier.predict(store)["cluster"])


def test_distance_by_hand_and_outliers_by_tukey(made):
    _, found, _ = made
    unit = found["features"] / np.linalg.norm(found["features"], axis=1, keepdims=True)
    for c in np.unique(found["cluster"]):
        inside = found["cluster"] == c
        mean = unit[inside].mean(0)
        distance = 1 - unit[inside] @ mean / np.linalg.norm(mean)
        assert np.allclose(found["distance"][inside], distance, atol=1e-5)
        low, high = np.quantile(distance, [0.25, 0.75])
        fence = high + 1.5 * (high - low)
        clear = np.abs(distance - fence) > 1e-4
        assert np.array_equal((distance > fence)[clear], found["is_outlier"][inside][clear])


def test_saved_and_read(made, tmp_path):
    classifier, found, store = made
    classifier.names[0] = "röd"
    classifier.save(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors", "names.json"]
    again = Classifier.load(tmp_path / "m", torch.device("cpu"))
    assert again.names == classifier.names
    assert again.spec == SPEC
    assert np.array_equal(again.predict(store)["cluster"], found["cluster"])


def test_a_model_of_the_future(made, tmp_path):
    made[0].save(tmp_path)
    config = (tmp_path / "config.json").read_text().replace('"format": 1', '"format": 2')
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="format 2, this version reads 1; upgrade"):
        Classifier.load(tmp_path, torch.device("cpu"))


def test_images_of_another_shape(made):
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\); got \(3, 8, 8\)"):
        made[0].predict(tiny_store(channels=3))


def test_the_batch_size_changes_rounding_only(made):
    classifier, found, store = made
    small, large = (classifier.predict(store, batch_size=size) for size in (7, 512))
    assert np.allclose(small["probabilities"], large["probabilities"], atol=1e-5)
    assert np.array_equal(small["cluster"], found["cluster"])
