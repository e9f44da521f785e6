"""Rotations, tiles and exemplars: the pretexts whose labels need no clustering."""

import math
from itertools import permutations as every_order

import pytest
import torch
import torch.nn.functional as F
from tiny import make_model, tiny_store
from torch import nn

from deepcluster.batches import train_batches
from deepcluster.losses import view_number
from deepcluster.methods.context import PAIRS
from deepcluster.methods.exemplar import Chosen
from deepcluster.methods.jigsaw import far_apart
from deepcluster.model import Arranged
from deepcluster.plan import resolve
from deepcluster.recipe import Targets, make_recipe
from deepcluster.settings import Settings
from deepcluster.trainer import Training, fit
from deepcluster.views import VIEWS, View

CPU = torch.device("cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# --- the loss ---


def test_view_number_is_the_mean_cross_entropy_of_each_view_with_its_own_number():
    logits = torch.randn(4, 3, 5, generator=seeded())
    naive = sum(-logits[v, b].log_softmax(0)[v] for v in range(4) for b in range(3)) / 12
    torch.testing.assert_close(view_number(logits), naive)


def test_view_number_at_its_limits():
    assert view_number(torch.zeros(4, 3, 4)).item() == pytest.approx(math.log(4), abs=1e-6)
    right = 50 * torch.eye(4)[:, None].expand(4, 3, 4)
    assert view_number(right).item() == pytest.approx(0, abs=1e-6)
    assert view_number(right.roll(1, 0)).item() == pytest.approx(50, abs=1e-4)


def test_view_number_is_float32_under_autocast_and_finite_on_one_winner():
    logits = torch.randn(4, 3, 4, generator=seeded())
    with torch.autocast("cpu", torch.bfloat16):
        inside = view_number(logits)
    assert view_number(logits.bfloat16()).dtype == torch.float32
    assert inside.item() == pytest.approx(view_number(logits).item(), abs=1e-6)
    one = torch.zeros(4, 3, 4)
    one[..., 0] = 1e4
    one.requires_grad_()
    loss = view_number(one)
    loss.backward()
    assert loss.isfinite()
    assert one.grad.isfinite().all()


# --- orders of tiles ---


def naive_orders(n):
    """The same greedy choice with Python's own numbers, over the permutations of five tiles."""
    everything = list(every_order(range(5)))
    chosen = [everything[0]]
    while len(chosen) < n:
        far = [[sum(a != b for a, b in zip(order, other, strict=True)) for other in chosen] for order in everything]
        chosen.append(everything[max(range(len(far)), key=lambda i: (min(far[i]), sum(far[i]), -i))])
    return chosen


def test_orders_are_chosen_greedily(monkeypatch):
    monkeypatch.setattr("deepcluster.methods.jigsaw.TILES", 5)
    assert far_apart.__wrapped__(30).tolist() == [list(order) for order in naive_orders(30)]


@pytest.mark.parametrize(("n", "least", "mean"), [(9, 9, 9), (24, 7, 8.304), (64, 7, 8.123)])
def test_orders_differ_in_most_tiles(n, least, mean):
    orders = far_apart(n)
    distance = (orders[:, None] != orders).sum(-1)[~torch.eye(n, dtype=torch.bool)]
    assert orders.shape == (n, 9)
    assert orders.sort(1).values.eq(torch.arange(9)).all()
    assert orders[0].tolist() == list(range(9))
    assert distance.min() == least  # so no two are equal
    assert distance.float().mean().item() == pytest.approx(mean, abs=5e-4)


def test_fewer_orders_are_the_first_of_many_and_always_the_same():
    assert torch.equal(far_apart(24), far_apart(64)[:24])
    assert torch.equal(far_apart(24), far_apart.__wrapped__(24))


@pytest.mark.parametrize("n", [1, 1001])
def test_the_number_of_permutations_has_limits(n):
    with pytest.raises(ValueError, match=f"permutations must be between 2 and 1000; got {n}"):
        make_recipe("jigsaw", permutations=n)


# --- the head ---


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["jigsaw", "context"])
def test_the_head_equals_a_network_on_permuted_tiles(name, training):
    recipe = make_recipe(name, **({"permutations": 7} if name == "jigsaw" else {}))
    orders = far_apart(7) if name == "jigsaw" else torch.tensor([(4, j) for j in (0, 1, 2, 3, 5, 6, 7, 8)])
    torch.manual_seed(0)
    head = recipe.head(6, recipe.heads[0]).train(training)
    nn.init.normal_(head.norm.weight)
    nn.init.normal_(head.norm.bias)
    head.norm.running_mean.normal_()
    features = torch.randn(9, 5, 6)

    places, hidden = orders.shape[1], 256
    # the first layer's weight, place by place, as one layer that reads all codes side by side
    plain = nn.Linear(places * 128, hidden, bias=False)
    blocks = head.place.weight.detach().view(places, hidden, 128)
    plain.weight = nn.Parameter(torch.cat(list(blocks), 1))
    codes = F.relu(head.code(features))
    rows = [torch.cat([codes[tile] for tile in order], 1) for order in orders]  # each (B, places * 128)
    norm = (head.norm.running_mean.clone(), head.norm.running_var.clone(), head.norm.weight, head.norm.bias)
    expected = head.out(F.relu(F.batch_norm(plain(torch.cat(rows)), *norm, training))).view(len(orders), 5, -1)

    torch.testing.assert_close(head(features), expected, atol=1e-5, rtol=1e-5)
    assert expected.shape == (recipe.heads[0], 5, recipe.heads[0])


def test_row_p_of_the_head_is_what_order_p_of_the_tiles_themselves_gives():
    recipe = make_recipe("jigsaw", permutations=5)
    model, tiles = make_model(recipe).eval(), list(torch.rand(9, 4, 1, 8, 8, generator=seeded()))
    (logits,) = model(tiles)
    for p, order in enumerate(far_apart(5)):
        (shown,) = model([tiles[i] for i in order])
        torch.testing.assert_close(shown[0], logits[p])


def test_the_pairs_are_the_middle_and_each_neighbour_once():
    assert [pair[0] for pair in PAIRS] == [4] * 8
    assert sorted(pair[1] for pair in PAIRS) == [0, 1, 2, 3, 5, 6, 7, 8]


def test_as_many_outputs_as_orders():
    with pytest.raises(ValueError, match="5 orders need as many outputs; got 4"):
        Arranged(6, 4, far_apart(5))


# --- the views ---


def place_of(shape):
    """An image whose red is its pixel's x and whose green is its y, both as shares of the side."""
    _, height, width = shape
    x, y = ((torch.arange(side) + 0.5) / side for side in (width, height))
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width), torch.zeros(height, width)])


@pytest.mark.parametrize("shape", [(3, 60, 60), (3, 30, 90)])
@pytest.mark.parametrize("tile", range(9))
def test_a_tile_shows_its_part_of_the_image(tile, shape):
    row, column = divmod(tile, 3)
    images = place_of(shape).expand(400, *shape)
    half = 0.5 / shape[1]  # a pixel at the image's edge: what lies beyond its centre is its border, repeated
    cut = View(cell=(row, column), area=VIEWS[f"tile{tile}"].area, size=0.5)(images, seeded())
    assert VIEWS[f"tile{tile}"].cell == (row, column)
    assert cut.shape == (400, 3, shape[1] // 2, shape[2] // 2)
    share = 64 / 75 / 3  # a tile's side
    for seen, number, n in ((cut[:, 0, 0], column, shape[2] // 2), (cut[:, 1, :, 0], row, shape[1] // 2)):
        torch.testing.assert_close(seen[:, -1] - seen[:, 0], torch.full((400,), share * (1 - 1 / n)), atol=half, rtol=0)
        start = seen[:, 0] - share / n / 2  # the tile's edge
        assert start.min() == pytest.approx(number / 3, abs=half)  # anywhere in its cell, and nowhere else
        assert start.max() == pytest.approx((number + 1) / 3 - share, abs=half)
    x, y = cut[:, 0].mean((1, 2)), cut[:, 1].mean((1, 2))
    assert torch.corrcoef(torch.stack([x, y]))[0, 1].abs() < 0.2


def test_a_whole_cell_is_a_ninth_of_the_image():
    image = torch.rand(1, 2, 12, 12, generator=seeded())
    for row in range(3):
        for column in range(3):
            cell = View(cell=(row, column), size=4)(image, seeded())
            torch.testing.assert_close(cell, image[..., 4 * row : 4 * row + 4, 4 * column : 4 * column + 4])


@pytest.mark.parametrize("side", [4, 8, 16])
def test_small_images_have_tiles_the_small_network_takes(side):
    for name in ("jigsaw", "context", "rotnet"):
        settings = Settings(method=f"{name}+sela", n_clusters=3, backbone="convnet")
        assert resolve(settings, 100, (1, side, side), CPU).stages[0].method == name


def test_tiles_have_colours_of_their_own_and_are_never_mirrored():
    view = VIEWS["tile4"]
    assert view.flip == view.flip_grey == 0
    images = torch.full((200, 3, 9, 9), 0.5) + torch.tensor([0.2, 0.0, -0.2]).view(3, 1, 1)
    store_rng = seeded()
    first, second = VIEWS["tile4"](images, store_rng), VIEWS["tile5"](images, store_rng)
    assert ((first - second).abs().amax((1, 2, 3)) > 0.01).float().mean() > 0.95  # the same flat image
    grey = (first.amax(1) - first.amin(1)).amax((1, 2)) < 1e-5
    assert grey.float().mean().item() == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize("cell", [(0, 3), (-1, 0)])
def test_a_cell_outside_the_grid_is_refused(cell):
    with pytest.raises(ValueError, match="each 0, 1 or 2; got"):
        View(cell=cell)


@pytest.mark.parametrize("name", ["rotnet", "jigsaw", "context", "exemplar"])
def test_the_views_of_a_rank_are_its_rows_of_the_whole(name, monkeypatch):
    recipe, store = make_recipe(name), tiny_store(channels=3)
    targets = Chosen(20)(torch.zeros(96, 1), (), Targets.unlabelled(1, 96), 0)
    whole = list(train_batches(store, targets, recipe, 32, seed=3))
    for lo, hi in ((0, 11), (11, 32)):
        monkeypatch.setattr("deepcluster.dist.shard", lambda n, lo=lo, hi=hi: (lo, hi))
        for batch, all_rows in zip(train_batches(store, targets, recipe, 32, seed=3), whole, strict=True):
            assert torch.equal(batch.ids, all_rows.ids[lo:hi])
            for view, expected in zip(batch.views, all_rows.views, strict=True):
                assert torch.equal(view, expected[lo:hi])


@pytest.mark.parametrize("name", ["jigsaw", "context"])
def test_all_tiles_are_seen_in_order(name):
    assert make_recipe(name).views == tuple(f"tile{i}" for i in range(9))


@pytest.mark.parametrize("view", ["clean", "weak", "strong", "crop"])
def test_each_rotation_has_its_number_and_is_not_mirrored(view):
    """A plane that rises to the right: turned 90 degrees it rises to the top, and so on; a mirror would hide it."""
    recipe = make_recipe("rotnet", view=view)
    plane = place_of((3, 24, 24))[:1].expand(50, 3, 24, 24)
    assert len(recipe.views) == recipe.heads[0] == 4
    for name, (right, up) in zip(recipe.views, [(1, 0), (0, 1), (-1, 0), (0, -1)], strict=True):
        seen = VIEWS[name](plane, seeded()).mean(1)
        rises = (seen[:, :, 12:].mean((1, 2)) - seen[:, :, :12].mean((1, 2))) * right
        climbs = (seen[:, :12].mean((1, 2)) - seen[:, 12:].mean((1, 2))) * up
        assert ((rises + climbs) > 0.05).all()


def test_a_view_that_is_not_turned_is_refused():
    with pytest.raises(ValueError, match="unknown view 'tile1-rotate0'"):
        make_recipe("rotnet", view="tile1")


def test_the_head_of_rotations_sees_one_view_at_a_time():
    recipe = make_recipe("rotnet")
    torch.manual_seed(0)
    head, features = recipe.head(6, 4).eval(), torch.randn(4, 5, 6, generator=seeded())
    whole = head(features)
    assert whole.shape == (4, 5, 4)
    other = features.clone()
    other[2] += 1
    changed = (head(other) != whole).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, False]


# --- vectors, and networks too large for a tile ---


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("rotnet", "rotnet: feature vectors cannot be rotated; choose a method without rotations"),
        ("jigsaw", "jigsaw: feature vectors have no tiles; choose a method without them"),
        ("context", "context: feature vectors have no tiles"),
    ],
)
def test_vectors_are_refused_before_training(method, said):
    with pytest.raises(ValueError, match=said):
        resolve(Settings(method=f"{method}+sela", n_clusters=3), 100, (16,), CPU)


def test_vectors_may_be_exemplars():
    assert resolve(Settings(method="exemplar+sela", n_clusters=3), 100, (16,), CPU).backbone == "mlp"


def test_a_backbone_too_large_for_tiles_is_refused_before_training():
    with pytest.raises(ValueError, match=r"alexnet does not work on 3x32x32 images: .*--image-size"):
        resolve(Settings(method="jigsaw+sela", n_clusters=3, backbone="alexnet"), 100, (3, 64, 64), CPU)


# --- exemplars ---


def test_exemplars_are_drawn_by_the_seed_alone():
    before = Targets.unlabelled(1, 50)
    drawn = Chosen(20)(torch.zeros(50, 3), (), before, 7)
    assert drawn.labels.dtype == torch.int32
    assert drawn.labels.shape == (1, 50)
    assert sorted(drawn.labels[drawn.labels >= 0].tolist()) == list(range(20))
    assert (drawn.labels == -1).sum() == 30
    assert (before.labels == -1).all()
    assert torch.equal(drawn.partners, before.partners)
    part_of_them = Chosen(20)(torch.ones(13, 3), (), before, 7)  # another process's features
    assert torch.equal(drawn.labels, part_of_them.labels)
    assert not torch.equal(drawn.labels, Chosen(20)(torch.zeros(50, 3), (), before, 8).labels)


def test_no_more_exemplars_than_images():
    labels = Chosen(1000)(torch.zeros(50, 3), (), Targets.unlabelled(1, 50), 0).labels
    assert sorted(labels[0].tolist()) == list(range(50))


def test_only_exemplars_are_seen_and_equally_often():
    recipe, seen = make_recipe("exemplar", exemplars=8), torch.zeros(96, dtype=torch.long)
    targets = recipe.assigner(torch.zeros(96, 1), (), Targets.unlabelled(1, 96), 5)
    for batch in train_batches(tiny_store(), targets, recipe, 32, seed=0):
        seen += torch.bincount(batch.ids, minlength=96)
    assert (seen[targets.labels[0] >= 0] == 12).all()
    assert (seen[targets.labels[0] < 0] == 0).all()


def test_exemplars_stay_the_same_over_a_run():
    labels = []
    recipe = make_recipe("exemplar", exemplars=8)
    training = Training(epochs=3, batch_size=32)
    fit(make_model(recipe), tiny_store(), recipe, training, [lambda r: labels.append(r.state.targets.labels)])
    assert torch.equal(labels[0], labels[2])


# --- learning ---


def test_rotations_of_images_with_a_bright_top_are_learnt():
    recipe, store, reports = make_recipe("rotnet", view="clean"), tiny_store(), []
    store.data[:] = store.data // 4
    store.data[:, :, :3] += 180
    fit(make_model(recipe), store, recipe, Training(epochs=12, batch_size=32, lr=0.01), [reports.append])
    assert reports[0].loss > 0.3
    assert reports[-1].loss < 0.2


@pytest.mark.parametrize(("name", "chance"), [("jigsaw", math.log(24)), ("context", math.log(8))])
def test_tiles_of_images_with_a_gradient_are_put_in_order(name, chance):
    recipe, store, reports = make_recipe(name), tiny_store(channels=3, size=24), []
    ramp = (place_of((3, 24, 24)) * 255).to(torch.uint8)
    store.data[:] = ramp
    fit(make_model(recipe, channels=3), store, recipe, Training(epochs=15, batch_size=32, lr=0.01), [reports.append])
    assert reports[0].loss > 0.7 * chance
    assert reports[-1].loss < 0.35 * chance
