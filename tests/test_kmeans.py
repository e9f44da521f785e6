"""k-means against plain Python and faiss, and where k-means usually breaks."""

import math
import statistics
from itertools import pairwise

import faiss
import pytest
import torch

from deepcluster import kmeans as module
from deepcluster.kmeans import kmeans, nearest, one_pass, plus_plus, refill, sums


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def blobs(n, k, d, seed=0):
    return normal(k, d, seed)[torch.arange(n) % k] * 3 + normal(n, d, seed + 1)


def inertia(x, centroids):
    return torch.cdist(x, centroids).min(1).values.square().sum().item()


def lloyd(rows, centroids, iterations):
    """Ten lines of plain Python, for clusters that never get empty."""
    for _ in range(iterations):
        groups = [[] for _ in centroids]
        for row in rows:
            groups[min(range(len(centroids)), key=lambda c: math.dist(row, centroids[c]))].append(row)
        centroids = [[statistics.fmean(column) for column in zip(*group, strict=True)] for group in groups]
    return [min(range(len(centroids)), key=lambda c: math.dist(row, centroids[c])) for row in rows], centroids


@pytest.mark.parametrize("iterations", [1, 3, 30])
def test_matches_plain_python_from_the_same_start(iterations):
    x = blobs(120, 5, 3)
    labels, centroids = kmeans(x, 5, seed=0, iterations=iterations, start=x[:5])
    their_labels, their_centroids = lloyd(x.double().tolist(), x[:5].double().tolist(), iterations)
    assert labels.tolist() == their_labels
    torch.testing.assert_close(centroids, torch.tensor(their_centroids))


@pytest.mark.parametrize("k", [8, 40])
def test_is_not_worse_than_faiss_on_blobs(k):
    x, ours, theirs = blobs(1500, 20, 8), [], []
    for seed in range(5):
        ours.append(inertia(x, kmeans(x, k, seed=seed)[1]))
        other = faiss.Kmeans(8, k, niter=20, seed=seed + 1, max_points_per_centroid=10_000, min_points_per_centroid=1)
        other.train(x.numpy())
        theirs.append(inertia(x, torch.from_numpy(other.centroids)))
    assert statistics.mean(ours) <= 1.03 * statistics.mean(theirs)


def test_is_not_worse_than_faiss_where_first_centroids_are_drawn_at_random(monkeypatch):
    monkeypatch.setattr(module, "PLUS_PLUS", 0)
    test_is_not_worse_than_faiss_on_blobs(40)


def test_first_centroids_are_drawn_from_everywhere_and_not_from_the_first_rows(monkeypatch):
    monkeypatch.setattr(module, "PLUS_PLUS", 0)
    x = torch.arange(1000.0)[:, None]
    _, centroids = kmeans(x, 10, seed=0, iterations=0)
    assert centroids.mean() > 250
    assert len(centroids.unique()) == 10


def test_plus_plus_takes_one_row_of_each_far_blob():
    x = torch.eye(6).repeat(20, 1) * 100 + normal(120, 6) * 0.01
    for seed in range(10):  # random rows would miss a blob 98 times in 100
        chosen = plus_plus(x, 6, torch.Generator().manual_seed(seed), x[:0])
        assert sorted(chosen.argmax(1).tolist()) == list(range(6))


def test_nearest_gives_index_and_squared_distance():
    x, centroids = normal(50, 4), normal(7, 4, seed=1)
    index, distance = nearest(x, centroids)
    exact, where = torch.cdist(x.double(), centroids.double()).square().min(1)
    assert index.dtype == torch.int64
    assert torch.equal(index, where)
    torch.testing.assert_close(distance, exact.float(), atol=1e-5, rtol=1e-5)


def test_the_same_seed_gives_the_same_clusters():
    x = blobs(300, 6, 4)
    first, again, other = (kmeans(x, 6, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])


def test_lloyd_runs_on_a_sample_and_then_labels_every_row(monkeypatch):
    monkeypatch.setattr(module, "POINTS_PER_CENTROID", 20)
    x, seen = blobs(2000, 4, 3), []
    monkeypatch.setattr(module, "one_pass", lambda x, *rest: seen.append(len(x)) or one_pass(x, *rest))
    labels, centroids = kmeans(x, 4, seed=0)
    assert set(seen) == {80}
    assert torch.equal(labels, nearest(x, centroids)[0])
    assert inertia(x, centroids) < 1.1 * inertia(x, kmeans(x, 4, seed=0, start=centroids)[1])


def test_a_warm_start_keeps_the_ids():
    x = torch.eye(6).repeat(20, 1) * 10 + normal(120, 6)
    names = torch.tensor([4, 2, 0, 5, 1, 3])
    labels, centroids = kmeans(x, 6, seed=0, start=torch.eye(6)[names] * 9)
    assert torch.equal(centroids.argmax(1), names)
    assert torch.equal(names[labels], torch.arange(120) % 6)


def test_a_warm_start_is_done_once_inertia_hardly_falls(monkeypatch):
    x, seen = blobs(3000, 30, 6), []
    _, centroids = kmeans(x, 30, seed=0)
    monkeypatch.setattr(module, "one_pass", lambda *rest: seen.append(1) or one_pass(*rest))
    start = centroids + normal(30, 6, seed=9) * 0.05
    warm = kmeans(x, 30, seed=0, start=start)[1]
    few = len(seen)
    monkeypatch.setattr(module, "SETTLED", 0.0)
    assert inertia(x, warm) < 1.01 * inertia(x, kmeans(x, 30, seed=0, start=start)[1])
    assert few <= 5 < len(seen) - few


def test_a_cluster_without_a_start_is_drawn_anew_from_the_rows():
    x = normal(60, 3)
    start = torch.eye(3) * 10
    start[1] = math.nan
    _, centroids = kmeans(x, 3, seed=0, start=start, iterations=0)
    assert torch.equal(centroids[[0, 2]], start[[0, 2]])
    assert (x == centroids[1]).all(1).any()
    assert kmeans(x, 3, seed=0, start=start)[1].isfinite().all()


# --- empty clusters ---


def test_an_empty_cluster_gets_half_of_a_big_one():
    x = torch.tensor([[0.0, 0], [0, 1], [10, 0], [10, 1]])
    centroids = torch.tensor([[0, 0.5], [10, 0.5], [100, 100]])
    labels, _ = nearest(x, centroids)
    total, counts = sums(x, labels, 3)
    assert counts.tolist() == [2, 2, 0]
    assert total[:2].tolist() == [[0, 1], [20, 1]]
    filled = refill(centroids, counts)
    after = torch.bincount(nearest(x, filled)[0], minlength=3)
    assert filled.isfinite().all()
    assert (after == 0).sum() == 0  # 1 before: the halves of the donor part its two rows
    assert after.sum() == 4
    assert (filled[2] - centroids[0]).abs().max() < 0.01
    torch.testing.assert_close((filled[0] + filled[2]) / 2, centroids[0])  # apart by as much to either side
    assert not torch.equal(filled[2], filled[0])
    assert centroids[2].tolist() == [100, 100]  # not in place


def test_nothing_is_refilled_where_no_cluster_is_empty():
    centroids = normal(4, 3)
    assert torch.equal(refill(centroids, torch.tensor([5.0, 1, 2, 9])), centroids)


def test_the_largest_clusters_are_split_and_then_count_as_half():
    centroids = torch.eye(5) + 1
    filled = refill(centroids, torch.tensor([12.0, 8, 1, 0, 0]))
    assert torch.allclose(filled[3], centroids[0], atol=0.01)  # 12 is split first and counts 6 then, less than 8
    assert torch.allclose(filled[4], centroids[1], atol=0.01)
    assert torch.equal(filled[2], centroids[2])


def test_more_clusters_than_distinct_rows_is_no_error():
    x = (torch.eye(5) * 3).repeat(4, 1)
    labels, centroids = kmeans(x, 10, seed=0)
    counts = torch.bincount(labels, minlength=10)
    assert centroids.shape == (10, 5)
    assert centroids.isfinite().all()
    assert (counts == 0).sum() == 5
    assert sorted(counts[counts > 0].tolist()) == [4] * 5


@pytest.mark.parametrize("n", [1, 5])
def test_more_clusters_than_rows_is_no_error(n):
    labels, centroids = kmeans(normal(n, 3), 10, seed=0)
    assert len(labels.unique()) == n
    assert centroids.isfinite().all()


def test_refilling_leaves_a_start_far_from_all_rows_with_no_empty_cluster():
    x = blobs(300, 6, 4)
    start = torch.cat([x[:1], torch.full((5, 4), 1e3)])
    labels, _ = kmeans(x, 6, seed=0, start=start)
    assert torch.bincount(labels, minlength=6).min() > 0


def test_no_rows_at_all_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="k-means needs at least one row"):
        kmeans(torch.empty(0, 3), 2, seed=0)


# --- spherical ---


def test_spherical_clusters_of_four_rows_by_hand():
    x = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [-1, 0]])
    start = torch.tensor([[1.0, 0], [0, 1], [0, -1]])
    labels, _ = nearest(x, start)
    assert labels.tolist() == [0, 0, 1, 1]
    total, counts = sums(x, labels, 3)
    assert counts.tolist() == [2, 2, 0]
    _, centroids = kmeans(x, 3, seed=0, start=start, iterations=1, spherical=True)
    expected = torch.tensor([[0.948683, 0.316228], [-0.707107, 0.707107]])
    torch.testing.assert_close(torch.nn.functional.normalize(total[:2], dim=1).float(), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(centroids[1], expected[1], atol=1e-6, rtol=0)
    # the paper leaves the third where it was; here it gets half of the first, 1/1024 away
    torch.testing.assert_close(centroids[[0, 2]], expected[[0, 0]], atol=2e-3, rtol=0)
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(3))


def test_the_spherical_objective_never_falls():
    x = torch.nn.functional.normalize(blobs(200, 5, 6), dim=1)
    start = x[:5]
    objective = [
        (x @ kmeans(x, 5, seed=0, start=start, iterations=i, spherical=True)[1].T).max(1).values.sum().item()
        for i in range(8)
    ]
    assert all(b >= a - 1e-4 for a, b in pairwise(objective))
    assert objective[-1] > objective[0]


# --- sums ---


def test_sums_leave_out_the_unlabelled_and_do_not_lose_digits():
    x, labels = torch.full((2_000_000, 1), 0.1), torch.zeros(2_000_000, dtype=torch.int64)
    labels[::2] = -1
    total, counts = sums(x, labels, 2)
    assert counts.tolist() == [1_000_000, 0]
    assert total[0].item() == pytest.approx(1_000_000 * x[0].item(), rel=1e-3)  # one float32 sum is off by 1 %


def test_a_cluster_drawn_anew_avoids_those_that_were_kept():
    """Two blobs, one centroid kept on the first: the other is nearly always drawn from the second."""
    x = torch.cat([torch.zeros(50, 2), torch.full((50, 2), 9.0)]) + torch.rand(
        100, 2, generator=torch.Generator().manual_seed(0)
    )
    start = torch.tensor([[0.5, 0.5], [float("nan"), float("nan")]])
    for seed in range(20):
        labels, _ = kmeans(x, 2, seed=seed, start=start)
        assert labels.tolist() == [0] * 50 + [1] * 50
