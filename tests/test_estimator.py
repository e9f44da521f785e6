"""DeepCluster as scikit-learn knows estimators."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from deepcluster import DeepCluster, evaluate, fit, load

N = 24
QUICK = {"n_clusters": 3, "method": "iic", "epochs": 1, "batch_size": 8, "precision": "fp32"}
rng = np.random.default_rng(0)
SHAPES = {
    "(N, H, W)": rng.integers(0, 256, (N, 8, 8), dtype=np.uint8),
    "(N, C, H, W)": rng.integers(0, 256, (N, 3, 8, 8), dtype=np.uint8),
    "(N, H, W, C)": rng.integers(0, 256, (N, 8, 8, 3), dtype=np.uint8),
    "(N, D)": rng.normal(size=(N, 5)).astype(np.float32),
}


@pytest.fixture(params=SHAPES)
def x(request):
    return SHAPES[request.param]


def test_fit_predict_transform_on_every_shape(x):
    model = DeepCluster(**QUICK, image_size=8)
    before = model.get_params()
    assert model.fit(x) is model
    assert model.get_params() == before, "fit changed a parameter"
    assert model.labels_.shape == (N,)
    assert model.labels_.dtype == np.int64
    sizes = np.bincount(model.labels_, minlength=3)
    assert list(sizes) == sorted(sizes, reverse=True)
    assert np.array_equal(model.predict(x), model.labels_)
    p = model.predict_proba(x)
    assert p.shape == (N, 3)
    assert np.allclose(p.sum(1), 1, atol=1e-5)
    assert np.array_equal(p.argmax(1), model.labels_)
    assert model.transform(x).shape == (N, model.classifier_.dim)
    assert np.array_equal(model.predict(x[:5]), model.labels_[:5])
    assert model.plan_.backbone == ("mlp" if x.ndim == 2 else "convnet")


def test_the_same_random_state_gives_the_same_labels(x):
    one, two = (DeepCluster(**QUICK, random_state=4).fit(x) for _ in range(2))
    assert np.array_equal(one.predict_proba(x), two.predict_proba(x))
    other = DeepCluster(**QUICK, random_state=5).fit(x)
    assert not np.array_equal(one.predict_proba(x), other.predict_proba(x))


@pytest.mark.parametrize("method", ["auto", "simclr+sela", "sela", "deepcluster"])
def test_every_plan_takes_features(method):
    model = DeepCluster(**{**QUICK, "method": method}).fit(SHAPES["(N, D)"])
    assert np.array_equal(model.predict(SHAPES["(N, D)"]), model.labels_)


def test_clone_and_params():
    model = DeepCluster(4, lr=0.1, params={"overcluster": 2}, init_from="a")
    twin = clone(model)
    assert twin is not model
    assert twin.get_params() == model.get_params()
    assert twin.set_params(n_clusters=9).n_clusters == 9
    assert model.n_clusters == 4
    assert not hasattr(twin, "labels_")


def test_fit_predict_and_the_function():
    x = SHAPES["(N, H, W)"]
    assert np.array_equal(DeepCluster(**QUICK).fit_predict(x), fit(x, **QUICK).labels_)


def test_score_is_the_accuracy_of_the_best_renaming():
    model = DeepCluster(**QUICK).fit(x := SHAPES["(N, H, W)"])
    assert model.score(x, (model.labels_ + 1) % 3) == 1
    y = model.labels_.copy()
    y[0] = (y[0] + 1) % 3
    assert model.score(x, y) == pytest.approx((N - 1) / N)


def test_saved_and_loaded(tmp_path):
    x = SHAPES["(N, H, W)"]
    model = DeepCluster(**QUICK, out=tmp_path / "run").fit(x)
    model.save_pretrained(tmp_path / "elsewhere")
    for again in (load(tmp_path / "run"), DeepCluster.from_pretrained(tmp_path / "elsewhere")):
        assert np.array_equal(again.predict_proba(x), model.predict_proba(x))
    assert np.array_equal(load(tmp_path / "run").labels_, model.labels_)
    assert load(tmp_path / "run").names_ == model.names_


def test_bad_rows_are_left_out_and_named():
    x = SHAPES["(N, D)"].copy()
    x[3, 1] = np.nan
    model = DeepCluster(**QUICK).fit(x)
    assert len(model.labels_) == len(model.names_) == N - 1
    assert [name for name, _ in model.skipped_] == ["array/000003"]


def test_not_fitted():
    with pytest.raises(NotFittedError):
        DeepCluster().predict(SHAPES["(N, H, W)"])


@pytest.mark.parametrize(("trained", "asked"), [("(N, H, W)", "(N, D)"), ("(N, D)", "(N, H, W)")])
def test_features_are_no_images(trained, asked):
    model = DeepCluster(**QUICK).fit(SHAPES[trained])
    with pytest.raises(ValueError, match="the model was trained on"):
        model.predict(SHAPES[asked])


def test_features_of_another_width():
    model = DeepCluster(**QUICK).fit(SHAPES["(N, D)"])
    with pytest.raises(ValueError, match=r"trained on images of shape \(5,\); got \(4,\)"):
        model.predict(SHAPES["(N, D)"][:, :4])


def test_y_is_ignored():
    x = SHAPES["(N, H, W)"]
    assert np.array_equal(DeepCluster(**QUICK).fit(x, np.arange(N)).labels_, DeepCluster(**QUICK).fit(x).labels_)


def test_a_run_is_kept_when_no_labelled_image_can_be_read(tmp_path, caplog):
    x = SHAPES["(N, D)"].copy()
    x[3, 1] = np.nan
    np.savez(tmp_path / "x.npz", images=x, labels=np.where(np.arange(N) == 3, 5, -1))
    model = DeepCluster(**QUICK, out=tmp_path / "run")._fit(str(tmp_path / "x.npz"), labels="auto")
    assert model.scores_ is None
    assert "no image that has a label can be read" in caplog.text
    assert np.array_equal(load(tmp_path / "run").labels_, model.labels_)


def test_results_are_written_before_they_are_scored(tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("no score")

    np.savez(tmp_path / "x.npz", images=SHAPES["(N, D)"], labels=np.arange(N) % 3)
    monkeypatch.setattr(evaluate, "scores", broken)
    monkeypatch.setattr("deepcluster.log.Metrics.__call__", lambda *_: None)
    with pytest.raises(ValueError, match="no score"):
        DeepCluster(**QUICK, out=tmp_path / "run")._fit(str(tmp_path / "x.npz"), labels="auto")
    assert len(load(tmp_path / "run").labels_) == N
