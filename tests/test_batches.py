"""The order of images: balanced where it should be, complete, and a function of the seed alone."""

from dataclasses import replace

import pytest
import torch
from tiny import store_of, tiny_store

from deepcluster import batches as module
from deepcluster.batches import eval_batches, seen, steps, train_batches, uniform_over
from deepcluster.losses import pseudo_label
from deepcluster.recipe import Recipe, Targets

skewed = torch.tensor([0] * 7000 + [1] * 2000 + [2] * 800 + [4] * 200, dtype=torch.int32)  # class 3 is empty
skewed = skewed[torch.randperm(10_000, generator=torch.Generator().manual_seed(9))]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(n):
    """Image i is as bright as i: a view tells which image it shows."""
    return store_of(torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).repeat(1, 1, 8, 8))


def shown(view):
    return (view.flatten(1).mean(1) * 255).round().long()


def recipe(**changes):
    return Recipe(**{"heads": (3,), "objective": pseudo_label, "views": ("clean",)} | changes)


def labelled(*labels):
    rows = torch.tensor(labels, dtype=torch.int32)
    return replace(Targets.unlabelled(*rows.shape), labels=rows)


# --- drawing uniformly over pseudo-classes ---


def test_every_non_empty_class_is_drawn_equally_often():
    ids = uniform_over(skewed, 10_000, generator())
    share = torch.bincount(skewed[ids].long(), minlength=5) / 10_000
    torch.testing.assert_close(share, torch.tensor([0.25, 0.25, 0.25, 0, 0.25]), atol=1e-3, rtol=0)


def test_any_part_of_an_epoch_is_balanced_not_only_the_whole():
    ids = uniform_over(skewed, 10_000, generator())[:2000]
    share = torch.bincount(skewed[ids].long(), minlength=5) / 2000
    torch.testing.assert_close(share, torch.tensor([0.25, 0.25, 0.25, 0, 0.25]), atol=0.04, rtol=0)  # 4 sigma


def test_no_image_is_left_out_before_another_is_repeated():
    ids = uniform_over(skewed, 10_000, generator())
    times = torch.bincount(ids, minlength=10_000)
    for label, drawn in ((1, 2500), (2, 2500), (4, 2500)):
        mine = times[skewed == label]
        assert mine.sum() == drawn
        assert mine.min() >= drawn // len(mine) >= 1  # all of them, and again
        assert mine.max() <= drawn // len(mine) + 1
    assert times[skewed == 0].max() == 1  # 2500 different ones of 7000


def test_different_images_of_a_large_class_are_drawn_in_different_epochs():
    first, second = (set(uniform_over(skewed, 10_000, generator(s)).tolist()) for s in (0, 1))
    assert len(first | second) > len(first) + 1000


def test_the_unlabelled_are_never_drawn():
    labels = skewed.clone()
    labels[::3] = -1
    ids = uniform_over(labels, 10_000, generator())
    assert len(ids) == 10_000
    assert (labels[ids] >= 0).all()


def test_a_remainder_goes_to_random_classes():
    labels = torch.arange(4, dtype=torch.int32).repeat(5)
    seen = {tuple(torch.bincount(labels[uniform_over(labels, 10, generator(s))].long()).tolist()) for s in range(9)}
    assert all(sum(counts) == 10 and set(counts) == {2, 3} for counts in seen)
    assert len(seen) > 1


def test_nothing_to_balance_over_is_an_error():
    with pytest.raises(ValueError, match="no image has a pseudo-label to balance over"):
        uniform_over(torch.full((5,), -1), 5, generator())


# --- training batches ---


def test_a_balanced_epoch_shows_images_with_their_own_labels():
    store = numbered(200)
    targets = labelled([0] * 200, [0] * 140 + [1] * 40 + [2] * 16 + [3] * 4)  # the last head's are balanced over
    seen = []
    for batch in train_batches(store, targets, recipe(balanced=True), 50, seed=3):
        assert torch.equal(shown(batch.views[0]), batch.ids)  # not the id in another order's table
        seen.append(targets.labels[1][batch.ids].long())
    share = torch.bincount(torch.cat(seen)) / 200
    torch.testing.assert_close(share, torch.full((4,), 0.25), atol=0.01, rtol=0)


def test_an_ordinary_epoch_shows_every_image_once():
    batches = list(train_batches(numbered(200), Targets.unlabelled(1, 200), recipe(), 50, seed=3))
    ids = torch.cat([b.ids for b in batches])
    assert [len(b.ids) for b in batches] == [50] * 4
    assert sorted(ids.tolist()) == list(range(200))
    assert ids.tolist() != list(range(200))
    assert torch.equal(shown(torch.cat([b.views[0] for b in batches])), ids)


def test_a_remainder_is_left_out_of_the_epoch():
    batches = list(train_batches(numbered(107), Targets.unlabelled(1, 107), recipe(), 50, seed=0))
    assert [len(b.ids) for b in batches] == [50, 50]


@pytest.mark.parametrize("balanced", [False, True])
def test_an_epoch_is_a_function_of_the_seed(balanced):
    store, targets = tiny_store(), labelled((torch.arange(96) % 3).tolist())
    words = recipe(views=("strong", "crop"), balanced=balanced)

    def epoch(seed):
        return list(train_batches(store, targets, words, 32, seed))

    first = epoch(5)
    torch.manual_seed(77)
    torch.rand(10)
    again, other = epoch(5), epoch(6)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert not torch.equal(a.ids, c.ids)
        for u, v, w in zip(a.views, b.views, c.views, strict=True):
            assert torch.equal(u, v)
            assert not torch.equal(u, w)
    assert not torch.equal(first[0].views[0], first[0].views[1])


def test_other_views_show_a_partner_of_the_image():
    store = numbered(60)
    partners = torch.stack([(torch.arange(60) + 1) % 60, (torch.arange(60) + 7) % 60], 1)
    targets = replace(Targets.unlabelled(1, 60), partners=partners)
    steps_taken = []
    for batch in train_batches(store, targets, recipe(views=("clean", "clean", "clean")), 20, seed=0):
        own, first, second = (shown(view) for view in batch.views)
        assert torch.equal(own, batch.ids)
        assert torch.equal(first, second)  # one partner, seen twice
        steps_taken += ((first - own) % 60).tolist()
    assert set(steps_taken) == {1, 7}
    assert 15 < steps_taken.count(1) < 45


def test_without_partners_other_views_show_the_image_itself():
    for batch in train_batches(numbered(60), Targets.unlabelled(1, 60), recipe(views=("clean", "clean")), 20, seed=0):
        assert torch.equal(shown(batch.views[1]), batch.ids)


@pytest.mark.parametrize(("n", "size", "n_steps"), [(100, 50, 2), (107, 50, 2), (2, 2, 1), (50, 50, 1)])
def test_steps_of_an_epoch(n, size, n_steps):
    assert steps(n, size) == n_steps


@pytest.mark.parametrize("size", [0, 1, 101, -5])
def test_a_batch_that_cannot_be_is_refused(size):
    with pytest.raises(ValueError, match=f"batch_size must be between 2 and the 100 training images; got {size}"):
        steps(100, size)


def test_a_batch_must_leave_two_images_to_every_process(monkeypatch):
    monkeypatch.setattr(module.dist, "world", lambda: 4)
    assert steps(100, 8) == 12
    with pytest.raises(ValueError, match="batch_size 7 is less than 2 for each of 4 processes"):
        steps(100, 7)


# --- evaluation batches ---


@pytest.mark.parametrize("batch_size", [1, 7, 60, 500])
def test_evaluation_shows_all_images_in_order(batch_size):
    parts = list(eval_batches(numbered(60), batch_size=batch_size))
    assert max(len(p) for p in parts) <= batch_size
    assert torch.equal(shown(torch.cat(parts)), torch.arange(60))


@pytest.mark.parametrize("view", ["clean", "strong"])
@pytest.mark.parametrize("world", [2, 3, 7])
def test_shards_of_an_evaluation_are_the_parts_of_the_whole(world, view, monkeypatch):
    store = tiny_store(50)
    whole = torch.cat(list(eval_batches(store, view, 8, seed=4)))
    monkeypatch.setattr(module.dist, "world", lambda: world)
    shards = []
    for rank in range(world):
        monkeypatch.setattr(module.dist, "rank", lambda rank=rank: rank)
        shards += list(eval_batches(store, view, 8, seed=4))
    torch.testing.assert_close(torch.cat(shards), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("world", [2, 3])
def test_shards_of_training_batches_are_the_parts_of_the_whole(world, monkeypatch):
    store, targets = tiny_store(50), labelled((torch.arange(50) % 3).tolist())
    words = recipe(views=("strong", "crop"), balanced=True)
    whole = list(train_batches(store, targets, words, 20, seed=4))
    monkeypatch.setattr(module.dist, "world", lambda: world)
    ranks = []
    for rank in range(world):
        monkeypatch.setattr(module.dist, "rank", lambda rank=rank: rank)
        ranks.append(list(train_batches(store, targets, words, 20, seed=4)))
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([r[step].ids for r in ranks]), batch.ids)
        for v in range(2):
            together = torch.cat([r[step].views[v] for r in ranks])
            torch.testing.assert_close(together, batch.views[v], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("scale", "shift"), [(1e-4, 0.0), (1000.0, 0.0), (1.0, 50.0)])
def test_noise_of_vectors_is_in_units_of_their_own_deviation(scale, shift):
    """What a view does to features must not depend on their units."""
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    x[:, 4] = 0  # a dead feature
    views = []
    for data in (x, x * scale + shift):
        store = store_of(data)
        seed = torch.Generator().manual_seed(1)
        mean, std = store.statistics
        views.append((seen(store, store.take(torch.arange(60)), "strong", seed, (0, 60)) - mean) / std)
    torch.testing.assert_close(views[0][:, :4], views[1][:, :4], rtol=1e-3, atol=1e-3)
    assert (views[0][:, :4] - (x[:, :4] - x[:, :4].mean(0)) / x[:, :4].std(0)).abs().mean() > 0.1
