"""Edits of clusters: what they do to old images and new ones, that all can be undone, and that files keep them."""

import json

import numpy as np
import pytest
import torch
from tiny import classified, tiny_store

from deepcluster import decisions, edits
from deepcluster.backbones import make_backbone
from deepcluster.classifier import COLUMNS, Classifier, Spec
from deepcluster.edits import Junk, Merge, Name, Step
from deepcluster.model import Model, Standardised

K = 5


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    backbone, dim = make_backbone("convnet", (1, 8, 8))
    model, store = Model(backbone, dim, (K,), Standardised), tiny_store(200)
    store.data[:8] = torch.arange(8, dtype=torch.uint8)[:, None, None, None] * 20  # unlike the noise of the others
    for _ in range(20):  # measure the deviation of the scores, which spreads the images over the clusters
        model([store.data / 255])
    classifier, found = classified(model, Spec("convnet", (1, 8, 8), "Standardised", K, "0"), store)
    assert len(np.unique(found["cluster"])) == K
    return classifier, found["features"], found, store


@pytest.fixture
def made(trained, tmp_path):
    """A classifier of its own, the features, what it found, and the store."""
    trained[0].save(tmp_path / "fresh")
    return Classifier.load(tmp_path / "fresh", torch.device("cpu")), *trained[1:]


def step(*made):
    return Step(made, "2026-01-01T00:00:00")


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in COLUMNS)


EVERY = [
    step(Merge((1, 3))),
    step(Name(2, "red vans"), Junk(4)),
    "split",
    "nearest",
    step(Merge((0, 5, 4)), Name(0, "rest")),
]


def play(classifier, features, script=EVERY):
    """Apply all kinds of edits, one after the other; gives what was found before the first and after each."""
    seen = [classifier.describe(features)]
    for one in script:
        if one == "split":
            one = step(classifier.split(features, 0, 3))
        if one == "nearest":
            one = step(classifier.nearest())
        seen.append(classifier.edit(features, one))
    return seen


def test_a_merge_moves_nobody_else(made):
    classifier, features, before, store = made
    after = classifier.edit(features, step(Merge((3, 1))))
    gone = before["cluster"] == 3
    assert gone.any()
    assert np.array_equal(after["cluster"], np.where(gone, 1, before["cluster"]))
    old, new = (classifier.predict(store, ("probabilities",))["probabilities"] for _ in range(2))
    assert np.array_equal(old, new)
    assert (new[:, 3] == 0).all()
    assert np.allclose(new.sum(1), 1, atol=1e-6)
    inside = after["cluster"] == 1
    assert np.allclose(after["probability"][inside], new[inside, 1])
    assert not (after["second"] == 3).any()


def test_a_merge_adds_probabilities(made):
    classifier, features, _, store = made
    before = classifier.predict(store, ("probabilities",))["probabilities"]
    classifier.edit(features, step(Merge((0, 2, 4))))
    after = classifier.predict(store, ("probabilities",))["probabilities"]
    assert np.allclose(after[:, 0], before[:, [0, 2, 4]].sum(1), atol=1e-6)
    assert np.array_equal(after[:, [1, 3]], before[:, [1, 3]])


def test_all_merged_into_one(made):
    classifier, features, _, _ = made
    found = classifier.edit(features, step(Merge(tuple(range(K)))))
    assert set(found["cluster"]) == {0}
    assert set(found["second"]) == {-1}
    assert np.array_equal(found["margin"], found["probability"])
    assert np.allclose(found["probability"], 1, atol=1e-6)


def test_a_split_gives_every_part_what_is_nearest(made):
    classifier, features, before, store = made
    edit = classifier.split(features, 1, 3)
    after = classifier.edit(features, step(edit))
    inside = before["cluster"] == 1
    assert np.array_equal(after["cluster"][~inside], before["cluster"][~inside])
    assert set(after["cluster"][inside]) == {1, K, K + 1}
    sizes = [(after["cluster"] == c).sum() for c in (1, K, K + 1)]
    assert sizes[0] == max(sizes), "the largest part keeps the id"
    unit = features[inside] / np.linalg.norm(features[inside], axis=1, keepdims=True)
    parts = edit.centroids.numpy() / np.linalg.norm(edit.centroids.numpy(), axis=1, keepdims=True)
    assert np.array_equal(np.array([1, K, K + 1])[(unit @ parts.T).argmax(1)], after["cluster"][inside])
    p = classifier.predict(store, ("probabilities",))["probabilities"]
    assert p.shape == (len(store), K + 2)
    assert np.allclose(p.sum(1), 1, atol=1e-6)
    assert np.array_equal(p.argmax(1), after["cluster"])


def test_split_twice_and_merge_a_part(made):
    classifier, features, before, _ = made
    classifier.edit(features, step(classifier.split(features, 0, 2)))
    classifier.edit(features, step(classifier.split(features, K, 2)))
    found = classifier.edit(features, step(Merge((2, K + 1))))
    assert classifier.n_clusters == K + 2
    assert not (found["cluster"] == K + 1).any()
    moved = (found["cluster"] == 2) & (before["cluster"] == 0)
    assert moved.any()


def test_outliers_go_to_the_nearest_mean_and_no_one_else_moves(made):
    classifier, features, before, _ = made
    centroids = classifier.centroids.clone()
    after = classifier.edit(features, step(classifier.nearest()))
    assert before["is_outlier"].any()
    inside = ~before["is_outlier"]
    assert np.array_equal(after["cluster"][inside], before["cluster"][inside])
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    means = torch.nn.functional.normalize(centroids, dim=1).numpy()
    assert np.array_equal(after["cluster"][~inside], (unit @ means.T).argmax(1)[~inside])
    assert (after["cluster"] != before["cluster"]).any(), "this example moves nobody"


def test_outliers_never_go_to_an_empty_cluster(made):
    classifier, features, _, _ = made
    classifier.edit(features, step(Merge((0, 1))))  # 1 has no images, so no mean
    found = classifier.edit(features, step(classifier.nearest()))
    assert not (found["cluster"] == 1).any()


def test_an_empty_cluster_is_nobodys_nearest_even_if_all_others_are_opposite():
    edit = edits.Nearest(torch.tensor([[-1.0, 0], [0, 0], [-1, 0.1]]), torch.tensor([0.5, 0.5, 0.5]))
    cluster, p = edit.apply(torch.tensor([[1.0, 0]]), torch.tensor([2]), torch.ones(1, 3) / 3)
    assert cluster.tolist() == [2]
    assert torch.equal(p, torch.ones(1, 3) / 3)


def test_means_and_reach_are_measured_anew(made):
    classifier, features, _, _ = made
    found = classifier.edit(features, step(Merge((0, 1))))
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    inside = found["cluster"] == 0
    assert np.allclose(classifier.centroids[0], unit[inside].mean(0), atol=1e-6)
    assert not classifier.centroids[1].any()
    low, high = np.quantile(found["distance"][inside], [0.25, 0.75])
    assert float(classifier.reach[0]) == pytest.approx(high + 1.5 * (high - low), abs=1e-6)


def test_new_images_obey_all_edits(made):
    classifier, features, _, store = made
    last = play(classifier, features)[-1]
    again = classifier.predict(store, COLUMNS)
    assert same(last, again)


def test_every_step_can_be_undone(made):
    classifier, features, first, _ = made
    reach, centroids = classifier.reach.clone(), classifier.centroids.clone()
    names, junk = [list(classifier.names)], [set(classifier.junk)]
    seen = [classifier.describe(features)]
    for one in EVERY[:2]:
        seen.append(classifier.edit(features, one))
        names.append(list(classifier.names))
        junk.append(set(classifier.junk))
    seen.append(classifier.edit(features, step(classifier.split(features, 0, 3))))
    for back in (2, 1, 0):
        assert same(classifier.undo(features), seen[back])
        assert (classifier.names, classifier.junk) == (names[back], junk[back])
    assert same(seen[0], first)
    assert torch.equal(classifier.reach, reach)
    assert torch.equal(classifier.centroids, centroids)
    with pytest.raises(ValueError, match="there is no edit to undo"):
        classifier.undo(features)


def test_names_of_merged_clusters(made):
    classifier, features, _, _ = made
    classifier.edit(features, step(Name(1, "cats"), Name(2, "dogs")))
    classifier.edit(features, step(Merge((0, 2))))
    assert classifier.names[0] == "dogs", "the nameless one takes the other's name"
    classifier.edit(features, step(Merge((0, 1))))
    assert classifier.names[0] == "dogs", "the smallest id keeps its name"


def test_junk_is_marked_and_unmarked(made):
    classifier, features, _, _ = made
    classifier.edit(features, step(Junk(1), Junk(2)))
    assert classifier.junk == {1, 2}
    classifier.edit(features, step(Junk(2, junk=False)))
    assert classifier.junk == {1}
    classifier.edit(features, step(Merge((0, 1))))
    assert classifier.junk == set(), "a good cluster stays good with some junk in it"
    classifier.edit(features, step(Junk(0)))
    classifier.edit(features, step(classifier.split(features, 0, 2)))
    assert classifier.junk == {0, K}, "parts of junk are junk"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (Merge((1, 9)), "there is no cluster 9; there are 0-4"),
        (Merge((1, -1)), "there is no cluster -1"),
        (Merge((1, 1)), "two different clusters or more; got \\[1, 1\\]"),
        (Merge((1,)), "two different clusters or more; got \\[1\\]"),
        (Merge(()), "two different clusters or more"),
        (Name(7, "x"), "there is no cluster 7"),
        (Junk(5), "there is no cluster 5"),
    ],
)
def test_an_edit_that_cannot_be_changes_nothing(made, edit, said):
    classifier, features, before, _ = made
    with pytest.raises(ValueError, match=said):
        classifier.edit(features, step(Name(0, "first"), edit))
    assert classifier.names == [""] * K
    assert classifier.steps == []
    assert same(classifier.describe(features), before)


def test_what_a_merge_took_away_is_gone(made):
    classifier, features, _, _ = made
    classifier.edit(features, step(Merge((0, 2))))
    with pytest.raises(ValueError, match="there is no cluster 2; there are 0-1, 3-4"):
        classifier.edit(features, step(Name(2, "x")))


@pytest.mark.parametrize(("parts", "said"), [(1, "split it into 2 to"), (10**6, "split it into 2 to")])
def test_a_split_into_too_few_or_too_many(made, parts, said):
    classifier, features, _, _ = made
    with pytest.raises(ValueError, match=said):
        classifier.split(features, 0, parts)
    with pytest.raises(ValueError, match="there is no cluster 77"):
        classifier.split(features, 77, 2)


def test_a_split_of_equal_images():
    with pytest.raises(ValueError, match="cluster 3 has fewer than 2 different images"):
        edits.split(3, torch.ones(8, 4), 2)


def test_files_keep_all_edits(made, tmp_path):
    classifier, features, _, store = made
    last = play(classifier, features)[-1]
    classifier.save(tmp_path / "m")
    again = Classifier.load(tmp_path / "m", torch.device("cpu"))
    assert same(again.predict(store, COLUMNS), last)
    assert (again.names, again.junk) == (classifier.names, classifier.junk)
    assert [s.when for s in again.steps] == [s.when for s in classifier.steps]
    assert json.loads((tmp_path / "m/names.json").read_text()) == classifier.names
    for _ in range(len(EVERY)):
        assert same(again.undo(features), classifier.undo(features))
    again.save(tmp_path / "m")
    fresh = Classifier.load(tmp_path / "m", torch.device("cpu"))
    assert (fresh.names, fresh.steps) == ([""] * K, [])
    assert same(fresh.predict(store, COLUMNS), play(classifier, features, [])[0])


def test_the_network_is_not_written_again_for_an_edit(made, tmp_path):
    classifier, features, _, _ = made
    classifier.save(tmp_path / "m")
    before = (tmp_path / "m/model.safetensors").read_bytes()
    play(classifier, features)
    classifier.save(tmp_path / "m")
    assert (tmp_path / "m/model.safetensors").read_bytes() == before


@pytest.mark.parametrize("damage", [b"", b"\x00" * 40, b"{}", slice(0, 100), slice(0, -1)])
def test_damaged_edits(made, tmp_path, damage):
    classifier, features, _, _ = made
    play(classifier, features)
    classifier.save(tmp_path / "m")
    file = tmp_path / "m/edits.safetensors"
    file.write_bytes(file.read_bytes()[damage] if isinstance(damage, slice) else damage)
    with pytest.raises(ValueError, match=r"cannot read .*edits.safetensors"):
        Classifier.load(tmp_path / "m", torch.device("cpu"))


@pytest.mark.parametrize(
    "words",
    [
        {"format": 2, "names": [""] * K, "steps": []},
        {"format": 1, "names": [""] * 3, "steps": []},
        {"format": 1, "names": [""] * K, "steps": [{"when": "", "edits": [{"edit": "explode"}]}]},
        {"format": 1, "names": [""] * K, "steps": [{"when": "", "edits": [{"edit": "merge", "clusters": [0, 99]}]}]},
        {"format": 1, "names": [""] * K, "steps": [{"when": "", "edits": [{"edit": "merge", "other": 1}]}]},
        {"format": 1, "names": [""] * K, "steps": [{"when": "", "edits": [{"edit": "split", "cluster": 1}]}]},
    ],
)
def test_edits_of_another_model_or_version(made, tmp_path, words):
    from safetensors.torch import save_file

    classifier, _, _, _ = made
    classifier.save(tmp_path / "m")
    tensors = {"centroids": classifier.centroids, "reach": classifier.reach}
    save_file(tensors, tmp_path / "m/edits.safetensors", metadata={"edits": json.dumps(words)})
    with pytest.raises(ValueError, match="cannot read the model"):
        Classifier.load(tmp_path / "m", torch.device("cpu"))


def test_a_model_with_edits_can_be_exported(made):
    """No step may look at the values of a batch."""
    classifier, features, _, store = made
    play(classifier, features)
    images = store.data[:8].float() / 255
    batch = torch.export.Dim("batch", min=2)
    traced = torch.export.export(classifier.eval(), (images,), dynamic_shapes=({0: batch},)).module()
    other = store.data[8:24].float() / 255
    for one, two in zip(traced(other), classifier(other), strict=True):
        assert torch.allclose(one.float(), two.float(), atol=1e-5)


def test_decisions_of_the_report(tmp_path, made):
    file = tmp_path / "decisions.json"
    words = {"format": 1, "names": {"3": "lost", "1": "cats", "2": ""}, "merge": [[3, 0], [1, 4]], "junk": [2, 4]}
    file.write_text(json.dumps(words))
    classifier, features, _, _ = made
    classifier.edit(features, decisions.read(file))
    assert classifier.names[:3] == ["lost", "cats", ""]
    assert classifier.junk == {1, 2}
    assert classifier.ids.gone == {3, 4}
    classifier.undo(features)
    assert (classifier.names, classifier.junk, classifier.ids.gone) == ([""] * K, set(), set())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"0": "keep", "3": "gone"}, "keep"),
        ({"3": "gone"}, "gone"),
        ({"0": "", "3": "gone"}, "gone"),
        ({"0": "", "3": ""}, "before"),
    ],
)
def test_names_decided_for_clusters_that_merge(tmp_path, made, names, expected):
    (tmp_path / "decisions.json").write_text(json.dumps({"names": names, "merge": [[0, 3]]}))
    classifier, features, _, _ = made
    classifier.edit(features, step(Name(0, "before")))
    classifier.edit(features, decisions.read(tmp_path / "decisions.json"))
    assert classifier.names[0] == expected


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "\xff", '{"merge": 5}', '{"merge": [["a"]]}', '{"names": {"x": "y"}}', '{"names": 3}',
     '{"junk": ["q"]}', '{"format": 2}'],
)  # fmt: skip
def test_decisions_that_cannot_be_read(tmp_path, text):
    file = tmp_path / "decisions.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="cannot read the decisions in"):
        decisions.read(file)
    with pytest.raises(ValueError, match="no such file"):
        decisions.read(tmp_path / "none.json")


def test_no_decisions(tmp_path):
    (tmp_path / "decisions.json").write_text('{"format": 1, "names": {}, "merge": [], "junk": []}')
    with pytest.raises(ValueError, match="there are no decisions in"):
        decisions.read(tmp_path / "decisions.json")
