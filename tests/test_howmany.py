"""How many clusters there are: made groups are counted, and data without groups is said to have none."""

import itertools
import json

import numpy as np
import pytest

from deepcluster import howmany, tree
from deepcluster.howmany import Evidence, evidence


def groups(k, dim=5, each=60, apart=12.0, seed=0):
    """(N, dim) images of k Gaussians of different sizes and shapes, no two closer than ``apart``; and their groups."""
    rng = np.random.default_rng(seed)
    centres = []
    while len(centres) < k:
        centre = rng.uniform(-4 * apart, 4 * apart, dim)
        if all(np.linalg.norm(centre - other) > apart for other in centres):
            centres.append(centre)
    sizes = [each + int(each * i / k) for i in range(k)]
    parts = [c + rng.normal(size=(n, dim)) * rng.uniform(0.5, 1.5, dim) for c, n in zip(centres, sizes, strict=True)]
    order = rng.permutation(sum(sizes))
    return np.concatenate(parts)[order].astype(np.float32), np.repeat(np.arange(k), sizes)[order]


@pytest.mark.parametrize("k", [2, 7, 15])
def test_made_groups_are_counted(k):
    x, y = groups(k)
    found = evidence(x)
    assert found.answers[0] == k
    row = found.rows[k - 2]
    assert (row.k, row.plateau) == (k, 1)
    assert min(row.stability, row.generalisation) > 0.99
    assert row.separation > 0.6
    near = ((x[:, None] - found.centroids) ** 2).sum(2).argmin(1)
    assert len({*zip(found.tree.groups(k)[near].tolist(), y.tolist(), strict=True)}) == k  # the very groups


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
@pytest.mark.parametrize("dim", [2, 40])
def test_no_structure(kind, dim):
    rng = np.random.default_rng(1)
    x = rng.uniform(size=(500, dim)) if kind == "uniform" else rng.normal(size=(500, dim))
    found = evidence(x, high=20)
    assert found.answers == ()
    assert found.sentence().startswith("no cluster structure for k = 2 to 20")


def test_groups_of_groups_give_two_answers():
    x, _ = groups(4, dim=3, apart=200.0)
    inner = np.array(list(itertools.product((-12, 12), repeat=3)))[[0, 3, 5]]
    part = np.random.default_rng(2).integers(0, 3, len(x))
    found = evidence((x + inner[part]).astype(np.float32))
    assert set(found.answers) == {12, 4}
    assert found.answers[0] == 12  # the finer first
    assert "12 clusters (or 4): " in found.sentence()


def test_the_same_seed_gives_the_same_evidence():
    x, _ = groups(3)
    a, b = evidence(x, seed=4, high=10), evidence(x, seed=4, high=10)
    assert a.to_dict() == b.to_dict()
    assert (a.centroids == b.centroids).all()
    assert evidence(x, seed=5, high=10).to_dict() != a.to_dict()


def test_the_range_changes_neither_tree_nor_gains():
    x, _ = groups(4)
    wide, narrow = evidence(x), evidence(x, low=3, high=6)
    assert narrow.tree == wide.tree
    assert [row.gain for row in narrow.rows] == [row.gain for row in wide.rows[1:5]]


def test_of_many_images_some_are_looked_at(monkeypatch):
    monkeypatch.setattr(howmany, "SAMPLE", 400)
    x, _ = groups(3, each=300)
    found = evidence(x)
    assert (found.n_images, found.n_sampled) == (len(x), 400)
    assert found.answers[0] == 3


def test_only_directions_count_if_asked():
    x, _ = groups(3, dim=6)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    long = x * np.random.default_rng(0).uniform(1, 50, (len(x), 1)).astype(np.float32)
    assert evidence(long, cosine=True).answers[0] == 3
    assert evidence(long, cosine=True).tree.merges[-1] == evidence(x, cosine=True).tree.merges[-1]


def test_copies_are_no_group():
    x = np.random.default_rng(0).normal(size=(400, 5))
    x[:30] = x[0]
    assert evidence(x).answers == ()


def test_equal_rows():
    with pytest.raises(ValueError, match="1 different images or groups of them, too few"):
        evidence(np.ones((100, 3)), high=5)


@pytest.mark.parametrize(
    ("n", "low", "high", "says"),
    [
        (100, 1, 5, "k goes from --min, at least 2"),
        (100, 6, 5, "got 6 to 5"),
        (100, 2, 51, "100 images can show at most 50 clusters; give --max 50 or less"),
        (100, 60, None, "at most 50 clusters"),
        (49, 2, None, "49 images are too few to tell .* give 50 or more"),
    ],
)
def test_ranges_that_cannot_be(n, low, high, says):
    with pytest.raises(ValueError, match=says):
        evidence(np.random.default_rng(0).normal(size=(n, 4)), low=low, high=high)


def test_features_that_are_no_numbers():
    x = groups(2)[0]
    x[3, 1] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        evidence(x)


def test_json_and_back():
    found = evidence(groups(3)[0], high=8)
    again = Evidence.from_dict(json.loads(json.dumps(found.to_dict())), found.centroids)
    assert again == found
    broken = found.to_dict()
    broken["tree"]["merges"] = [(0, 0)] * len(found.tree.merges)
    with pytest.raises(ValueError, match="no such thing"):
        Evidence.from_dict(broken, found.centroids)


def naive(x, labels, k):
    """The rule of ``tree.grow``, written out for groups of single images: the shallowest valley is filled."""
    near = np.sqrt(((x[:, None] - x[None]) ** 2).sum(2))
    core = np.sort(near, 1)[:, tree.NEIGHBOURS[0]]
    ratios = np.sort(near, 1)[:, 1 : tree.NEIGHBOURS[0] + 1]
    dim = 1 / (np.log(ratios[:, -1:] / ratios[:, :-1]).mean() * (tree.NEIGHBOURS[0] - 1) / (tree.NEIGHBOURS[0] - 2))
    thick = np.log(np.maximum(np.maximum(near, core), core[:, None]))
    sets, depths = [np.flatnonzero(labels == c) for c in range(labels.max() + 1)], []
    while len(sets) > k:
        best = (np.inf, 0, 0)
        for a, b in itertools.combinations(range(len(sets)), 2):
            links = np.sort(thick[np.ix_(sets[a], sets[b])].ravel())
            bridge = links[max(3, int(0.1 * min(len(sets[a]), len(sets[b])))) - 1]
            peak = max(np.quantile(np.log(core[s]), 0.1) for s in (sets[a], sets[b]))
            best = min(best, (dim * (bridge - peak), a, b))
        depths.append(best[0])
        sets[best[1]] = np.concatenate([sets[best[1]], sets.pop(best[2])])
    return sets, depths


def test_the_tree_is_the_one_of_the_rule():
    x, _ = groups(3, dim=3, each=40, apart=4)
    x = x.astype(np.float64)
    labels, _ = howmany._small(x.astype(np.float32), 9, seed=0)
    grown, _ = tree.grow(tree.distances(x), labels)
    for k in (2, 4, 7):
        sets, depths = naive(x, labels, k)
        assert {frozenset(s.tolist()) for s in sets} == {
            frozenset(np.flatnonzero(grown.groups(k)[labels] == g).tolist()) for g in range(k)
        }
        assert np.allclose(grown.valleys[: len(depths)], depths, atol=1e-3)
    assert grown.valley(2) == grown.valleys[-1]


@pytest.mark.slow
def test_the_promise():
    """20 made sets of 2 to 30 groups, and 10 of noise: see scripts/howmany.py, which prints them."""
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
    import howmany as script

    assert sum(evidence(x).answers[:1] == (k,) for x, k in map(script.groups, range(20))) >= 18
    assert all(evidence(script.noise(seed)).answers == () for seed in range(10))
