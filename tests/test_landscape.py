"""The map of a run and its neighbours: right, the same every time, and kept beside the features."""

import logging

import numpy as np
import pytest

from deepcluster import landscape as module
from deepcluster.landscape import landscape, landscape_of


def groups(n, count=4, dim=16, noise=0.3, seed=0):
    """Features (n, dim) around ``count`` directions, and which one each row belongs to."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(count, dim))
    which = rng.integers(0, count, n)
    return (centres[which] + noise * rng.normal(size=(n, dim))).astype(np.float32), which


def cosines(x):
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    return unit @ unit.T


def same(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("positions", "neighbours", "distances"))


KINDS = {
    "noise": lambda n, d: np.random.default_rng(0).normal(size=(n, d)),
    "equal": lambda n, d: np.ones((n, d)),
    "zeros": lambda n, d: np.zeros((n, d)),
    "one direction": lambda n, d: np.random.default_rng(0).uniform(1, 2, (n, 1)) * np.ones((1, d)),
}


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 40])
@pytest.mark.parametrize("d", [1, 2, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_any_size(n, d, kind):
    found = landscape(KINDS[kind](n, d).astype(np.float32))
    k = min(8, n - 1)
    assert (found.positions.shape, found.positions.dtype) == ((n, 2), np.float32)
    assert (found.neighbours.shape, found.neighbours.dtype) == ((n, k), np.int32)
    assert (found.distances.shape, found.distances.dtype) == ((n, k), np.float32)
    assert np.isfinite(found.positions).all()
    assert np.abs(found.positions).max() <= 1
    assert np.abs(found.positions.max(0) + found.positions.min(0)).max() < 1e-6, "not centred"
    ids = np.arange(n)[:, None]
    assert all(len({*row, i}) == k + 1 for i, row in enumerate(found.neighbours.tolist())), "itself, or one twice"
    assert ((found.neighbours >= 0) & (found.neighbours < max(n, 1)) & (found.neighbours != ids)).all()
    assert ((found.distances >= 0) & (found.distances <= 2)).all()
    assert (np.diff(found.distances, axis=1) >= 0).all(), "not nearest first"
    if kind not in ("noise", "zeros") or n == 1:
        assert not found.positions.any(), "images that are all alike must lie on one point"
    elif kind == "noise" and n > 2 and d > 1:
        assert np.abs(found.positions).max() > 0.99, "the map must fill its square"


def test_neighbours_are_the_nearest():
    x, _ = groups(150)
    found, cosine = landscape(x, k=5), cosines(x)
    np.fill_diagonal(cosine, -9)
    expected = np.argsort(-cosine, axis=1, kind="stable")[:, :5]
    assert np.array_equal(found.neighbours, expected)
    assert np.allclose(found.distances, 1 - np.take_along_axis(cosine, expected, 1), atol=1e-6)


def test_only_directions_count():
    x, _ = groups(60)
    scale = np.logspace(-22, 19, 60).astype(np.float32)[:, None]  # the squares of these overflow float32
    assert np.array_equal(landscape(x).neighbours, landscape(x * scale).neighbours)


def test_an_index_finds_nearly_all(monkeypatch):
    monkeypatch.setattr(module, "EXACT", 1000)
    x, _ = groups(4000, count=20, noise=1.0)
    ids, distances = module._neighbours(x, 8)
    cosine = cosines(x)
    np.fill_diagonal(cosine, -9)
    expected = np.argsort(-cosine, axis=1)[:, :8]
    recall = np.mean([len(set(a) & set(b)) / 8 for a, b in zip(ids.tolist(), expected.tolist(), strict=True)])
    assert recall > 0.97
    assert np.allclose(distances, 1 - np.take_along_axis(cosine, ids.astype(int), 1), atol=2e-3), (
        "more than half rounds"
    )
    assert (ids != np.arange(4000)[:, None]).all()


def test_an_index_of_wide_features_is_no_larger_and_finds_nearly_all(monkeypatch):
    monkeypatch.setattr(module, "EXACT", 1000)
    rng = np.random.default_rng(0)
    narrow, _ = groups(4000, count=20, noise=1.0)
    x = (narrow @ rng.normal(size=(narrow.shape[1], 512)) + rng.normal(size=(4000, 512)) * 0.1).astype(np.float32)
    made = []
    kind = module.faiss.IndexIVFScalarQuantizer
    train = kind.train
    monkeypatch.setattr(kind, "train", lambda self, x: made.append(self) or train(self, x))
    ids, distances = module._neighbours(x, 8)
    cosine = cosines(x)
    np.fill_diagonal(cosine, -9)
    expected = np.argsort(-cosine, axis=1)[:, :8]
    recall = np.mean([len(set(a) & set(b)) / 8 for a, b in zip(ids.tolist(), expected.tolist(), strict=True)])
    assert recall > 0.8
    assert np.abs(distances - (1 - np.take_along_axis(cosine, ids.astype(int), 1))).max() < 0.02
    assert made[0].code_size == 2 * module.DIRECTIONS


def test_images_in_cells_of_their_own_still_have_neighbours(monkeypatch):
    monkeypatch.setattr(module, "EXACT", 1000)
    rng = np.random.default_rng(0)
    x = np.concatenate([np.eye(40, 64), np.tile(rng.normal(size=(1, 64)), (6000, 1))]).astype(np.float32)
    ids, distances = module._neighbours(x, 30)
    assert ((ids >= 0) & (ids != np.arange(len(x))[:, None])).all()
    assert np.isfinite(distances).all()


def test_the_same_every_time():
    x, _ = groups(300)
    assert same(landscape(x), landscape(x.copy()))


@pytest.mark.parametrize("landmarks", [1000, 120], ids=["all are landmarks", "most are placed among them"])
def test_groups_stay_together_on_the_map(monkeypatch, landmarks):
    monkeypatch.setattr(module, "LANDMARKS", landmarks)
    x, which = groups(600)
    at = landscape(x).positions.astype(np.float64)
    near = ((at[:, None] - at[None]) ** 2).sum(2).argsort(1)[:, 1:6]
    assert (which[near] == which[:, None]).mean() > 0.99
    assert len(np.unique(at, axis=0)) > 590, "images lie on one another"


def test_between_two_groups_nothing_is_put_in_the_middle():
    placed = np.array([[-1.0, 0], [-0.99, 0], [1, 0], [0.99, 0], [0.98, 0]])
    at = module._among(placed, np.array([[1.0, 1.01, 1.02, 1.03, 1.04]]), np.array([[0, 1, 2, 3, 4]]))
    assert at[0, 0] == pytest.approx(-0.995, abs=1e-3)


def test_a_landmark_keeps_its_place(monkeypatch):
    placed = np.array([[0.0, 0], [0.02, 0], [1, 1]])
    at = module._among(placed, np.array([[0.0, 0.5, 0.6]]), np.array([[1, 0, 2]]))
    assert at[0] == pytest.approx([0.02, 0], abs=1e-6)


@pytest.mark.parametrize("x", [np.zeros(4), np.zeros((0, 3)), np.zeros((3, 0)), np.array([["a"]])])
def test_what_is_no_table_of_numbers_is_refused(x):
    with pytest.raises(ValueError, match="must be"):
        landscape(x)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_must_be_finite(bad):
    x, _ = groups(20)
    x[3, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        landscape(x)


@pytest.fixture
def run(tmp_path):
    np.save(tmp_path / "features.npy", groups(60)[0])
    return tmp_path


def never(*args):
    raise AssertionError("it was made anew")


def test_it_is_kept_and_found_again(run, monkeypatch):
    first = landscape_of(run)
    assert same(first, landscape(np.load(run / "features.npy")))
    assert {path.name for path in run.iterdir()} == {"features.npy", "map.npz"}
    monkeypatch.setattr(module, "landscape", never)
    assert same(first, landscape_of(run))


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("it was unpickled",))


def pickled(path):
    np.savez(path, positions=np.array([Bomb()], dtype=object))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-90]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 no zip"),
        lambda path: np.savez(path, x=np.zeros(3)),
        pickled,
        lambda path: np.savez(path, **{**dict(np.load(path)), "digest": np.array("0" * 40)}),
        lambda path: path.write_bytes(path.read_bytes().replace(path.read_bytes()[400:404], b"\0\1\2\3", 1)),
    ],
    ids=["cut", "empty", "no zip", "foreign", "pickled", "of other features", "a flipped byte"],
)
def test_what_does_not_fit_is_made_anew(run, damage):
    first = landscape_of(run)
    damage(run / "map.npz")
    assert same(first, landscape_of(run))
    np.load(run / "map.npz", allow_pickle=False)["digest"]


def test_other_features_get_another_map(run):
    first = landscape_of(run)
    np.save(run / "features.npy", groups(60, seed=1)[0])
    assert not same(first, landscape_of(run))


def test_a_map_that_cannot_be_kept_is_still_given(run, monkeypatch, caplog):
    (run / "map.npz.tmp").mkdir()
    with caplog.at_level(logging.WARNING, "deepcluster"):
        assert same(landscape_of(run), landscape(np.load(run / "features.npy")))
    assert "is not kept" in caplog.text
    assert not (run / "map.npz").exists()


def test_a_run_without_features(tmp_path):
    with pytest.raises(ValueError, match="did not finish"):
        landscape_of(tmp_path)
    np.save(tmp_path / "features.npy", groups(60)[0])
    whole = (tmp_path / "features.npy").read_bytes()
    (tmp_path / "features.npy").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="cannot read"):
        landscape_of(tmp_path)
