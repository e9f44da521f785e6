"""DeepCluster among scikit-learn's estimators: its own checks, and the tools that take any estimator."""

import pickle
from functools import partial

import numpy as np
import pytest
import sklearn
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks

from deepcluster import DeepCluster

QUICK = {"n_clusters": 3, "method": "iic", "epochs": 1, "batch_size": 8, "precision": "fp32"}
N, D = 24, 5
X = np.random.default_rng(0).normal(size=(N, D))


@parametrize_with_checks([DeepCluster(**QUICK), DeepCluster(**{**QUICK, "n_clusters": 2})])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_scikit_learns_own_checks_of_the_defaults():
    results = check_estimator(DeepCluster(), on_fail=None)
    assert [r["check_name"] for r in results if r["status"] == "failed"] == []
    assert sum(r["status"] == "passed" for r in results) > 40


def test_tags():
    tags = get_tags(DeepCluster())
    assert tags.estimator_type == "clusterer"
    assert tags.transformer_tags.preserves_dtype == ["float32"]
    assert not tags.non_deterministic
    assert not tags.input_tags.sparse
    assert tags.input_tags.two_d_array
    assert tags.input_tags.three_d_array


class Like:
    """An array only for those who ask."""

    def __array__(self, dtype=None, copy=None):
        return X.astype(dtype)


def frame(x):
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame(x, columns=list("abcde"))


def frozen(x):
    x = x.astype(np.float32)
    x.flags.writeable = False
    return x


def on_disk(x, folder):
    np.save(folder / "x.npy", x)
    return np.load(folder / "x.npy", mmap_mode="r")


KINDS = {
    "list of lists": lambda _: X.tolist(),
    "float32": lambda _: X.astype(np.float32),
    "objects": lambda _: X.astype(object),
    "array-like": lambda _: Like(),
    "DataFrame": lambda _: frame(X),
    "read-only": lambda _: frozen(X),
    "memory-mapped": partial(on_disk, X),
    "columns first": lambda _: np.asfortranarray(X),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("error")
def test_a_table_of_features_may_come_as(kind, tmp_path):
    x = KINDS[kind](tmp_path)
    model = DeepCluster(**QUICK).fit(x)
    same = DeepCluster(**QUICK).fit(X)
    assert np.array_equal(model.predict_proba(x), same.predict_proba(X))
    assert model.n_features_in_ == D
    assert hasattr(model, "feature_names_in_") == (kind == "DataFrame")


@pytest.mark.parametrize("kind", [np.int64, np.uint8, bool, np.float16])
def test_numbers_of_any_type_are_features(kind):
    x = np.random.default_rng(0).integers(0, 2, (N, D)).astype(kind)
    model = DeepCluster(**QUICK).fit(x)
    assert np.array_equal(model.predict(x.astype(np.float32)), model.labels_)


@pytest.mark.parametrize(
    ("x", "error", "said"),
    [
        (np.where(X[3, 1] == X, np.nan, X), ValueError, "NaN"),
        (np.where(X[3, 1] == X, np.inf, X), ValueError, "infinity"),
        (X * 1e300, ValueError, "infinity or a value too large"),
        (X * 1j, ValueError, "[Cc]omplex"),
        (X[0], ValueError, "1D array"),
        (X[:, :0], ValueError, "0 feature"),
        (X[:0], ValueError, "0 sample"),
        ([["a", "b"]] * N, ValueError, "could not convert string"),
        ([*X.tolist()[1:], [1.0]], ValueError, "inhomogeneous"),
        (np.zeros((N, 1, 1, 1, 1)), ValueError, "allowed are numbers"),
        ([], ValueError, "a list must hold image paths"),
        (None, ValueError, "a source is a folder"),
        ({"a": 1}, ValueError, "a source is a folder"),
    ],
)
def test_what_is_no_table_is_refused_everywhere(x, error, said):
    model = DeepCluster(**QUICK)
    with pytest.raises(error, match=said):
        model.fit(x)
    assert not hasattr(model, "labels_")
    model.fit(X)
    for method in (model.predict, model.predict_proba, model.transform, model.score):
        with pytest.raises(error, match=said):
            method(x)


def test_sparse_is_refused_by_name():
    scipy = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match=r"[Ss]parse"):
        DeepCluster(**QUICK).fit(scipy.csr_array(X))


def test_one_image_can_be_predicted_but_not_trained_on():
    model = DeepCluster(**QUICK).fit(X)
    assert model.predict(X[:1]).tolist() == model.labels_[:1].tolist()
    with pytest.raises(ValueError, match="1 sample"):
        DeepCluster(**QUICK).fit(X[:1])


@pytest.mark.parametrize("step", [1, 7, 23])
def test_features_in_parts_are_those_of_the_whole_bit_for_bit(step):
    model = DeepCluster(**QUICK).fit(X)
    parts = [model.transform(X[i : i + step]) for i in range(0, N, step)]
    assert np.array_equal(np.concatenate(parts), model.transform(X))
    assert np.array_equal(model.transform(X), model.embedding_)


def test_fitted_on_images_after_features_forgets_the_columns():
    model = DeepCluster(**QUICK).fit(frame(X))
    assert model.n_features_in_ == D
    model.fit(np.random.default_rng(0).integers(0, 256, (N, 8, 8), dtype=np.uint8))
    assert not hasattr(model, "n_features_in_")
    assert not hasattr(model, "feature_names_in_")


def test_nothing_is_known_before_fit():
    model = DeepCluster(**QUICK)
    before = dict(vars(model))
    names = ("labels_", "names_", "embedding_", "n_features_in_", "feature_names_in_", "classifier_", "skipped_")
    assert not any(hasattr(model, name) for name in names)
    model.fit(X)
    assert all(vars(model)[name] is value for name, value in before.items())
    assert all(name.startswith("_") or name.endswith("_") for name in vars(model).keys() - before.keys())
    assert all(hasattr(model, name) for name in names if name != "feature_names_in_")


@pytest.mark.parametrize("fitted", [False, True])
def test_pickle(fitted):
    model = DeepCluster(**QUICK)
    model = model.fit(X).merge_clusters([[0, 1]]).set_cluster_names({0: "both"}) if fitted else model
    again = pickle.loads(pickle.dumps(model))
    assert again.get_params() == model.get_params()
    again = again if fitted else again.fit(X)
    model = model if fitted else model.fit(X)
    assert np.array_equal(again.predict_proba(X), model.predict_proba(X))
    assert np.array_equal(again.embedding_, model.embedding_)
    assert again.image_info().equals(model.image_info())
    assert np.array_equal(again.split_cluster(0).labels_, model.split_cluster(0).labels_)


def test_fitting_again_begins_anew():
    model = DeepCluster(**QUICK).fit(X).merge_clusters([[0, 1]])
    first = DeepCluster(**QUICK).fit(X)
    assert np.array_equal(model.fit(X).predict_proba(X), first.predict_proba(X))
    assert len(model.classifier_.steps) == 0


NUMPY = {
    "n_clusters": np.int64(3), "epochs": np.int32(1), "batch_size": np.uint8(8), "random_state": np.int64(2),
    "use_labels": np.bool_(False), "method": np.str_("iic"), "lr": np.float32(0.5**9),
    "params": {"overcluster": np.int8(2)},
}  # fmt: skip


def test_numpys_numbers_are_numbers(tmp_path):
    plain = {k: v.item() if k != "params" else {"overcluster": 2} for k, v in NUMPY.items()}
    one = DeepCluster(**NUMPY, out=tmp_path / "a").fit(X)
    two = DeepCluster(**plain, out=str(tmp_path / "b")).fit(X)
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()
    assert np.array_equal(one.predict_proba(X), two.predict_proba(X))
    assert clone(one).get_params() == one.get_params()


def test_random_states():
    state = lambda model: model.fit(X).plan_.seed
    assert state(DeepCluster(**QUICK, random_state=5)) == 5
    one, two = (DeepCluster(**QUICK, random_state=np.random.RandomState(3)) for _ in range(2))
    first = state(one)
    assert first == state(two)
    assert first != state(one), "each fit draws"
    assert state(DeepCluster(**QUICK, random_state=None)) != state(DeepCluster(**QUICK, random_state=None))


@pytest.mark.parametrize("bad", ["a", -1, 0.5, True, np.random.default_rng(0)])
def test_no_random_state(bad):
    with pytest.raises(ValueError, match="seed must be a whole number"):
        DeepCluster(**QUICK, random_state=bad).fit(X)


def test_one_cluster_is_allowed():
    model = DeepCluster(**{**QUICK, "n_clusters": np.int64(1)}).fit(X)
    assert model.n_clusters == 1
    assert not model.labels_.any()
    assert np.allclose(model.predict_proba(X)[:, 0], 1)
    assert model.score(X) == 0
    for bad in (0, True, 1.5, "1"):
        with pytest.raises(ValueError, match="n_clusters must be a whole number of at least 2"):
            DeepCluster(**{**QUICK, "n_clusters": bad}).fit(X)


def test_feature_names_out_and_set_output():
    pandas = pytest.importorskip("pandas")
    model = DeepCluster(**QUICK).fit(X)
    names = model.get_feature_names_out()
    assert names[0] == "deepcluster0"
    assert len(names) == model.transform(X).shape[1]
    table = clone(model).set_output(transform="pandas").fit_transform(frame(X).set_index("a", drop=False))
    assert isinstance(table, pandas.DataFrame)
    assert list(table.columns) == list(names)
    assert list(table.index) == list(X[:, 0])
    assert np.array_equal(table.to_numpy(), model.transform(X))


def test_pipeline():
    pipeline = make_pipeline(StandardScaler(), DeepCluster(**QUICK))
    scaled = StandardScaler().fit_transform(X * 100 + 7)
    labels = pipeline.fit_predict(X * 100 + 7)
    assert np.array_equal(labels, DeepCluster(**QUICK).fit_predict(scaled))
    assert np.array_equal(pipeline.predict(X * 100 + 7), labels)
    assert pipeline.score(X * 100 + 7) == DeepCluster(**QUICK).fit(scaled).score(scaled)


def test_hooks_reach_fit_through_a_pipeline():
    seen = []
    pipeline = make_pipeline(StandardScaler(), DeepCluster(**QUICK))
    pipeline.fit(X, deepcluster__hooks=[lambda report: seen.append(report.clock.epoch)])
    assert seen == [0]
    with sklearn.config_context(enable_metadata_routing=True):
        pipeline = make_pipeline(StandardScaler(), DeepCluster(**QUICK).set_fit_request(hooks=True))
        pipeline.fit(X, hooks=[lambda report: seen.append(report.clock.epoch)])
    assert seen == [0, 0]


def test_fit_predict_learns_from_labels_where_it_may():
    y = np.where(np.arange(N) < 8, np.arange(N) % 2, -1)
    options = {"n_clusters": 2, "method": "simclr+fixmatch", "epochs": 1, "use_labels": True}
    model = DeepCluster(**options)
    assert np.array_equal(model.fit_predict(X, y), DeepCluster(**options).fit(X, y).labels_)
    assert model.n_labelled_ == 8
    with pytest.raises(ValueError, match="learns from y"):
        DeepCluster(**options).fit_predict(X)
