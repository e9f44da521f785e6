"""DeepCluster as scikit-learn knows estimators."""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from deepcluster import METHODS, DeepCluster, evaluate, fit, load
from deepcluster.plan import Plan, asked, resolve
from deepcluster.recipe import make_recipe
from deepcluster.settings import Settings
from deepcluster.store import stream

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
    assert DeepCluster.from_pretrained(tmp_path / "elsewhere").backbone == "convnet"
    for again in (load(tmp_path / "run"), DeepCluster.from_pretrained(tmp_path / "elsewhere")):
        assert np.array_equal(again.predict_proba(x), model.predict_proba(x))
    assert np.array_equal(load(tmp_path / "run").labels_, model.labels_)
    assert load(tmp_path / "run").names_ == model.names_


def test_bad_rows_of_a_file_are_left_out_and_named(tmp_path):
    x = SHAPES["(N, D)"].copy()
    x[3, 1] = np.nan
    np.save(tmp_path / "x.npy", x)
    model = DeepCluster(**QUICK, out=tmp_path / "run").fit(tmp_path / "x.npy")
    assert len(model.labels_) == len(model.names_) == N - 1
    (name, reason), *others = model.skipped_
    assert (name, reason, others) == (f"{tmp_path}/x.npy#3", "not finite: has nan or infinite values", [])
    assert load(tmp_path / "run").skipped_ == model.skipped_
    assert np.array_equal(model.predict(tmp_path / "x.npy"), model.labels_)
    assert model.n_features_in_ == load(tmp_path / "run").n_features_in_ == 5
    with pytest.raises(ValueError, match="NaN"):
        model.predict(x)


def test_bad_images_of_an_array_are_left_out():
    x = SHAPES["(N, H, W)"].astype(np.float32)
    x[3, 1, 1] = np.inf
    model = DeepCluster(**QUICK).fit(x)
    assert [name for name, _ in model.skipped_] == ["array/000003"]
    assert len(model.predict(x)) == N - 1


def test_names_of_features_are_kept_with_a_run(tmp_path):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(SHAPES["(N, D)"], columns=list("abcde"))
    DeepCluster(**QUICK, out=tmp_path / "run").fit(table)
    again = load(tmp_path / "run")
    assert again.feature_names_in_.tolist() == list("abcde")
    with pytest.raises(ValueError, match="feature names should match"):
        again.predict(table[table.columns[::-1]])


def test_a_model_finds_its_run_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = DeepCluster(**QUICK, out="run").fit(SHAPES["(N, H, W)"])
    monkeypatch.chdir("/")
    assert model.embedding_.shape == (N, model.classifier_.dim)
    assert len(model.merge_clusters([[0, 1]]).cluster_info()) == len(np.unique(model.labels_))


def test_skipped_names_that_a_spreadsheet_would_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, image in zip(("=a.png", "b.png", "'c.png", "d.png"), SHAPES["(N, H, W)"], strict=False):
        Image.fromarray(image).save(name)
    names = ["=a.png", "=gone.png", "b.png", "'gone.png", "'c.png", "-gone.png", "d.png"]
    model = DeepCluster(2, method="iic", epochs=1, image_size=8, out="run").fit(names)
    assert [name for name, _ in model.skipped_] == ["=gone.png", "'gone.png", "-gone.png"]
    assert load("run").skipped_ == model.skipped_


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
    with pytest.raises(ValueError, match="X has 4 features, but DeepCluster is expecting 5 features"):
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


@pytest.mark.parametrize("batch_size", [1, 5, 600])
def test_predict_gives_the_labels_in_batches_of_any_size(x, batch_size):
    model = DeepCluster(**QUICK, image_size=8).fit(x)
    (store,) = model._parts(x)
    found = model.classifier_.predict(store, batch_size=batch_size)
    margin = model.image_info()["margin"].to_numpy()
    assert (margin > 1e-4).sum() > N / 2
    assert np.array_equal(found["cluster"][margin > 1e-4], model.labels_[margin > 1e-4])
    assert np.abs(found["probabilities"] - model.predict_proba(x)).max() < 1e-5
    assert np.array_equal(model.predict(x), model.labels_), "in the usual batches, all"


@pytest.mark.gpu
@pytest.mark.parametrize("trained", ["cuda", "cpu"])
def test_predict_gives_the_labels_on_another_device(x, trained, tmp_path):
    model = DeepCluster(**QUICK, image_size=8, device=trained).fit(x)
    model.save_pretrained(tmp_path / "model")
    other = DeepCluster.from_pretrained(tmp_path / "model", device="cpu" if trained == "cuda" else "cuda")
    assert other.classifier_.order.device.type != trained
    margin = model.image_info()["margin"].to_numpy()
    assert np.array_equal(model.predict(x), model.labels_)
    assert np.array_equal(other.predict(x)[margin > 1e-4], model.labels_[margin > 1e-4])
    assert np.abs(other.predict_proba(x) - model.predict_proba(x)).max() < 1e-4


def test_many_images_in_parts(monkeypatch):
    """Parts of a stream that are no whole number of batches, as of a source that is not in the cache."""
    x = np.random.default_rng(1).integers(0, 256, (1300, 4, 4), dtype=np.uint8)
    model = DeepCluster(**{**QUICK, "batch_size": 256}, image_size=4).fit(x)
    assert np.array_equal(model.predict(x), model.labels_)
    monkeypatch.setattr("deepcluster.estimator.stream", lambda *args, **kw: stream(*args, **kw, rows=300))
    margin = model.image_info()["margin"].to_numpy()
    assert np.array_equal(model.predict(x)[margin > 1e-4], model.labels_[margin > 1e-4])


PARAMETERS = {
    "n_clusters": 3, "method": "simclr+iic", "backbone": "convnet", "image_size": 8, "epochs": 1, "batch_size": 8,
    "lr": 0.004, "random_state": 7, "precision": "fp32", "params": {"iic.overcluster": 2, "simclr.temperature": 0.25},
}  # fmt: skip


def test_a_loaded_model_has_the_parameters_of_its_run(tmp_path):
    x = SHAPES["(N, H, W)"]
    model = DeepCluster(**PARAMETERS, out=str(tmp_path / "run")).fit(x)
    again = load(tmp_path / "run", device="cpu")
    assert again.get_params() == {**model.get_params(), "device": "cpu"}
    assert again.plan_ == model.plan_
    assert again.skipped_ == []
    assert again.n_labelled_ == 0
    assert again.scores_ is None
    twin = clone(again).set_params(out=None).fit(x)
    assert np.array_equal(twin.predict_proba(x), model.predict_proba(x))


def test_what_auto_became_can_be_asked_for(tmp_path):
    x = SHAPES["(N, H, W)"]
    model = DeepCluster(3, epochs=1, out=tmp_path / "run").fit(x)
    again = load(tmp_path / "run")
    assert again.method == "iic+sela+sela"
    assert "iic+sela+sela" in repr(again)
    assert again.backbone == "convnet"
    assert again.batch_size == model.plan_.stages[0].batch_size
    assert clone(again).set_params(out=None).fit(x).plan_ == model.plan_


@pytest.mark.parametrize("name", sorted(n for n in METHODS if not make_recipe(n).supervised))
def test_a_plan_tells_what_was_asked_for(name):
    recipe = make_recipe(name)
    method = f"simclr+scan+{name}" if recipe.continues else f"{name}+sela" if recipe.pretext else name
    shape = (3, 32, 32)
    given = {"n_clusters": 4, "batch_size": 64, "lr": 0.01, "epochs": 2}
    made = resolve(Settings(method=method, **given), 4000, shape, torch.device("cpu"))
    found = asked(Plan.from_dict(made.to_dict()))
    assert {key: found[key] for key in given} == given
    settings = {"seed": found.pop("random_state"), "params": found.pop("params") or {}}
    assert resolve(Settings(**found, **settings), 4000, shape, torch.device("cpu")) == made
    assert set(found) | {"random_state", "params"} <= set(inspect.signature(DeepCluster).parameters)


def test_a_loaded_run_knows_how_many_labels_it_was_given(tmp_path):
    x, y = SHAPES["(N, D)"], np.where(np.arange(N) < 8, np.arange(N) % 2, -1)
    options = {"n_clusters": 2, "method": "simclr+fixmatch", "epochs": 1, "use_labels": True}
    model = DeepCluster(**options, out=tmp_path / "run").fit(x, y)
    again = load(tmp_path / "run")
    assert again.n_labelled_ == model.n_labelled_ == 8
    assert again.use_labels
    truth = np.arange(N) % 2
    assert again.score(x, truth) == model.score(x, truth)
    unseen = model.labels_[8:] == truth[8:]
    assert model.score(x, truth) == max(unseen.mean(), 1 - unseen.mean()), "images of known label are left out"


def test_a_list_of_paths_and_a_folder_are_sources(tmp_path):
    for i, image in enumerate(SHAPES["(N, H, W)"]):
        Image.fromarray(image).save(tmp_path / f"{i:02}.png")
    paths = sorted(tmp_path.glob("*.png"))
    model = DeepCluster(**QUICK, image_size=8).fit(paths)
    assert np.array_equal(model.labels_, DeepCluster(**QUICK, image_size=8).fit(tmp_path).labels_)
    assert np.array_equal(model.predict(tuple(map(str, paths[:4]))), model.labels_[:4])
    assert model.score(paths[:9]) == pytest.approx(model.score(SHAPES["(N, H, W)"][:9]), abs=1e-6)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_text("no image")
    for method in (model.predict, model.transform, model.score):
        with pytest.raises(ValueError, match="none of 1 can be used"):
            method(tmp_path / "bad")


def test_paths_may_be_given_as_paths(tmp_path):
    x = SHAPES["(N, D)"]
    DeepCluster(**QUICK, out=tmp_path / "first").fit(x)
    DeepCluster(**QUICK, out=tmp_path / "second", init_from=tmp_path / "first").fit(x)
    assert load(tmp_path / "second").init_from == str(tmp_path / "first")
