"""Edits and the report, as a user of Python has them: on a model in memory, and on one with a run directory."""

import pickle
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.exceptions import NotFittedError

from deepcluster import DeepCluster, load

N, K = 60, 4
QUICK = {"n_clusters": K, "method": "iic", "epochs": 1, "batch_size": 16, "precision": "fp32"}
X = np.random.default_rng(3).normal(size=(N, 6)).astype(np.float32)
IMAGES = np.random.default_rng(3).integers(0, 256, (N, 8, 8), dtype=np.uint8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of features: the array in a file, and the directory."""
    folder = tmp_path_factory.mktemp("trained")
    np.save(folder / "x.npy", X)
    DeepCluster(**QUICK, out=folder / "run").fit(folder / "x.npy")
    return folder


@pytest.fixture(params=["memory", "run"])
def model(request, trained, tmp_path):
    if request.param == "memory":
        return DeepCluster(**QUICK).fit(X)
    shutil.copytree(trained / "run", tmp_path / "run")
    return load(tmp_path / "run")


def state(model):
    """All that an edit may change, bit for bit."""
    classifier = model.classifier_
    return (
        model.image_info(),
        model.cluster_info(),
        classifier.names,
        sorted(classifier.junk),
        model.predict_proba(X).tobytes(),
        classifier.centroids.numpy().tobytes(),
        classifier.reach.numpy().tobytes(),
        {path.name: path.read_bytes() for path in model._run.rglob("*.parquet")} if model._run else {},
    )


def check(model):
    """What holds after any edit: table, clusters and predictions say the same, here and on disk."""
    assert np.array_equal(model.predict(X), model.labels_)
    p = model.predict_proba(X)
    assert np.allclose(p.sum(1), 1, atol=1e-5)
    assert (p >= 0).all()
    clusters = model.cluster_info().to_pylist()
    sizes = np.bincount(model.labels_, minlength=p.shape[1])
    assert {row["id"]: row["size"] for row in clusters} == {c: n for c, n in enumerate(sizes.tolist()) if n}
    assert sizes.sum() == N
    for row in clusters:
        assert model.representative_images(row["id"]) == row["representatives"]
        assert set(row["representatives"]) <= {
            name for name, c in zip(model.names_, model.labels_, strict=True) if c == row["id"]
        }
    if model._run:
        assert pq.read_table(model._run / "assignments.parquet").equals(model.image_info())
        assert pq.read_table(model._run / "clusters.parquet").equals(model.cluster_info())


EDITS = {
    "merge": lambda m: m.merge_clusters([[1, 3]]),
    "names": lambda m: m.set_cluster_names({0: "vans", 2: "<b>&"}),
    "junk": lambda m: m.mark_junk([2]),
    "split": lambda m: m.split_cluster(0, 3),
    "outliers": lambda m: m.reduce_outliers(),
}


@pytest.mark.parametrize("name", EDITS)
def test_after_an_edit_all_agree_and_undo_restores_everything(model, name):
    before = state(model)
    assert EDITS[name](model) is model
    check(model)
    assert state(model)[:5] != before[:5]
    assert model.undo() is model
    assert state(model) == before
    with pytest.raises(ValueError, match="no edit to undo"):
        model.undo()


def test_a_merge_moves_no_other_image(model):
    labels = model.labels_
    model.set_cluster_names({3: "kept"}).merge_clusters([[3, 1]])
    assert np.array_equal(model.labels_, np.where(labels == 3, 1, labels))
    assert model.classifier_.names[1] == "kept"
    assert not model.predict_proba(X)[:, 3].any()


def test_several_groups_are_one_step(model):
    labels = model.labels_
    model.merge_clusters([[0, 2], [1, 3]])
    assert np.array_equal(model.labels_, labels % 2)
    assert np.array_equal(model.undo().labels_, labels)


def test_names_and_marks(model):
    model.set_cluster_names({np.int64(1): "vans"}).mark_junk([1, 2])
    assert model.classifier_.names == ["", "vans", "", ""]
    table = model.image_info()
    assert np.array_equal(table["is_junk"].to_numpy(), np.isin(model.labels_, [1, 2]))
    assert set(table.filter(table["name"].to_numpy() == "vans")["cluster"].to_pylist()) == {1}
    model.mark_junk([2], junk=False).set_cluster_names({1: ""})
    assert [row["is_junk"] for row in model.cluster_info().to_pylist()] == [False, True, False, False]
    assert model.classifier_.names == [""] * K


def test_a_split_touches_one_cluster(model):
    labels = model.labels_
    model.split_cluster(1)
    assert np.array_equal(model.labels_[labels != 1], labels[labels != 1])
    parts, sizes = np.unique(model.labels_[labels == 1], return_counts=True)
    assert parts.tolist() == [1, K]
    assert sizes[0] >= sizes[1]


def test_outliers_go_to_the_nearest_mean(model):
    table = model.image_info()
    outlier, labels = table["is_outlier"].to_numpy(), model.labels_
    assert outlier.any()
    means = model.classifier_.centroids.numpy()
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)
    nearest = (unit(model.embedding_) @ unit(means).T).argmax(1)
    model.reduce_outliers()
    assert np.array_equal(model.labels_, np.where(outlier, nearest, labels))
    assert not np.array_equal(model.labels_, labels)


WRONG = {
    "merge of one": (lambda m: m.merge_clusters([[1, 1]]), "two different clusters"),
    "merge of none": (lambda m: m.merge_clusters([[1, 9]]), "there is no cluster 9; there are 0-3"),
    "one wrong of two": (lambda m: m.merge_clusters([[0, 1], [2, -1]]), "there is no cluster -1"),
    "merged twice": (lambda m: m.merge_clusters([[0, 1], [1, 2]]), "there is no cluster 1; there are 0, 2-3"),
    "no group": (lambda m: m.merge_clusters([0, 1]), "a group of them is a list"),
    "a broken number": (lambda m: m.merge_clusters([[0, 1.5]]), "clusters are whole numbers"),
    "name": (lambda m: m.set_cluster_names({0: "a", 7: "b"}), "there is no cluster 7"),
    "named by name": (lambda m: m.set_cluster_names({"vans": "b"}), "clusters are whole numbers"),
    "junk": (lambda m: m.mark_junk([0, 4]), "there is no cluster 4"),
    "split": (lambda m: m.split_cluster(4), "there is no cluster 4"),
    "split in one": (lambda m: m.split_cluster(0, 1), "split it into 2 to"),
    "split in too many": (lambda m: m.split_cluster(3, N), "split it into 2 to"),
    "representatives": (lambda m: m.representative_images(4), "there is no cluster 4"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_edit_changes_nothing(model, name):
    before, (edit, said) = state(model), WRONG[name]
    with pytest.raises(ValueError, match=said):
        edit(model)
    assert state(model) == before


def test_no_edit_is_no_step(model):
    model.set_cluster_names({}).merge_clusters([]).mark_junk([])
    with pytest.raises(ValueError, match="no edit to undo"):
        model.undo()


def test_edits_are_kept_wherever_the_model_goes(model, tmp_path):
    model.split_cluster(0).merge_clusters([[1, 2]]).set_cluster_names({1: "vans"}).mark_junk([3]).reduce_outliers()
    model.save_pretrained(tmp_path / "elsewhere")
    others = [DeepCluster.from_pretrained(tmp_path / "elsewhere"), pickle.loads(pickle.dumps(model))]
    others += [load(model._run)] if model._run else []
    for other in others:
        assert np.array_equal(other.predict(X), model.labels_)
        assert np.array_equal(other.predict_proba(X), model.predict_proba(X))
        assert other.classifier_.names == ["", "vans", "", "", ""]
        assert other.classifier_.junk == {3}
    assert all(state(other) == state(model) for other in others[1:])
    for _ in range(5):
        others[-1].undo()
    check(others[-1])
    assert others[-1].classifier_.names == [""] * K


def test_all_edits_can_be_undone_one_by_one(model):
    states = [state(model)]
    for edit in EDITS.values():
        states.append(state(edit(model)))
    for before in reversed(states[:-1]):
        assert state(model.undo()) == before


def test_a_model_without_its_images_says_so(trained):
    model = DeepCluster.from_pretrained(trained / "run/model")
    assert np.array_equal(model.predict(X), load(trained / "run").labels_)
    for of in ("labels_", "names_", "embedding_"):
        assert not hasattr(model, of)
    for edit in (*EDITS.values(), lambda m: m.undo(), lambda m: m.report("a.html"), lambda m: m.cluster_info()):
        with pytest.raises(AttributeError, match="knows no training images"):
            edit(model)


def test_decisions_of_the_page(model, tmp_path):
    (tmp_path / "decisions.json").write_text('{"merge": [[0, 3]], "names": {"1": "vans"}, "junk": [2]}')
    labels = model.labels_
    model.apply_decisions(tmp_path / "decisions.json")
    assert np.array_equal(model.labels_, np.where(labels == 3, 0, labels))
    assert model.classifier_.names[1] == "vans"
    assert model.classifier_.junk == {2}
    assert np.array_equal(model.undo().labels_, labels)


PICTURE = "data:image/"


@pytest.fixture
def pictures(tmp_path):
    """A model of images in memory, and one with a run directory."""
    np.save(tmp_path / "images.npy", IMAGES)
    return {
        "memory": DeepCluster(**QUICK, image_size=8).fit(IMAGES),
        "run": DeepCluster(**QUICK, image_size=8, out=tmp_path / "run").fit(tmp_path / "images.npy"),
        "path": DeepCluster(**QUICK, image_size=8).fit(str(tmp_path / "images.npy")),
    }


def test_report(pictures, tmp_path, caplog):
    for kind, model in pictures.items():
        model.set_cluster_names({1: "vans & <lorries>"})
        path = model.report(tmp_path / "pages" / f"{kind}.html")
        page = path.read_text(encoding="utf-8")
        assert path == tmp_path / "pages" / f"{kind}.html"
        assert "vans &amp; &lt;lorries&gt;" in page
        assert (page.count(PICTURE) > 10) == (kind != "memory"), kind
    assert "give them again" in caplog.text
    page = pictures["memory"].report(tmp_path / "pages/memory.html", IMAGES).read_text(encoding="utf-8")
    assert page.count(PICTURE) > 10
    before = (tmp_path / "run/report.html").read_bytes()
    assert pictures["run"].report() == tmp_path / "run/report.html"
    assert (tmp_path / "run/report.html").read_bytes() != before


def test_report_when_the_images_have_moved(pictures, tmp_path, caplog):
    (tmp_path / "images.npy").rename(tmp_path / "moved.npy")
    model = load(tmp_path / "run")
    assert model.report(tmp_path / "a.html").read_text(encoding="utf-8").count(PICTURE) <= 1
    assert "does not exist" in caplog.text
    assert model.report(tmp_path / "a.html", tmp_path / "moved.npy").read_text(encoding="utf-8").count(PICTURE) > 10


def test_report_refuses_other_images(pictures, tmp_path):
    for x in (IMAGES[::-1], IMAGES[:5], tmp_path / "none.npy"):
        with pytest.raises(ValueError, match=r"other images|does not exist"):
            pictures["run"].report(tmp_path / "a.html", x)
    assert not (tmp_path / "a.html").exists()
    with pytest.raises(ValueError, match="has no run directory"):
        pictures["memory"].report()
    with pytest.raises(ValueError, match="is a folder"):
        pictures["memory"].report(tmp_path)


def test_clusters_without_images():
    model = DeepCluster(**QUICK).fit(np.ones((N, 3)))
    assert not model.labels_.any()
    assert [row["id"] for row in model.cluster_info().to_pylist()] == [0]
    assert model.representative_images(1) == []


@pytest.mark.parametrize("edit", [*EDITS.values(), lambda m: m.undo(), lambda m: m.report("a.html")])
def test_an_edit_before_fit(edit):
    with pytest.raises(NotFittedError):
        edit(DeepCluster())
