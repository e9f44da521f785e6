"""SwAV: its objective against a naive version, its queue, its recipe."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import make_model, tiny_store

from deepcluster.methods.swav import SwappedPrediction
from deepcluster.model import Prototypes
from deepcluster.networks import Queued
from deepcluster.recipe import Clock, make_recipe
from deepcluster.trainer import Training, fit
from deepcluster.transport import sinkhorn

NONE, LATE, EARLY = torch.full((12,), -1), Clock(5, 10), Clock(0, 100)


def cosines(views, images=12, k=4, seed=0):
    z = torch.randn(views, images, 8, generator=torch.Generator().manual_seed(seed))
    c = torch.randn(k, 8, generator=torch.Generator().manual_seed(99))
    return F.normalize(z, dim=-1) @ F.normalize(c, dim=-1).T


def naive(scores, views, old=((), ())):
    """Loops over pairs; scores are cosines, ``old`` those of the queues of both assigning views."""
    losses = []
    for a in range(2):
        q = sinkhorn(torch.cat([scores[a], *old[a]]), epsilon=0.05)[: scores.shape[1]].double()
        for v in range(views):
            if v != a:
                losses.append(-(q * (scores[v].double() / 0.1).log_softmax(1)).sum(1).mean())
    return sum(losses).item() / len(losses)


@pytest.mark.parametrize("views", [2, 4])
def test_every_view_predicts_the_assignments_of_the_two_others(views):
    scores = cosines(views)
    loss = SwappedPrediction(views)(scores / 0.1, NONE, LATE)
    assert loss.item() == pytest.approx(naive(scores, views), abs=1e-5)


def test_temperature_and_epsilon_are_in_units_of_cosine():
    scores = cosines(2)
    expected = SwappedPrediction(2, temperature=0.1, epsilon=0.05)(scores / 0.1, NONE, LATE)
    same = SwappedPrediction(2, temperature=0.2, epsilon=0.05)(scores / 0.2, NONE, LATE)
    q = [sinkhorn(s, epsilon=0.05) for s in scores]
    naive = -(q[0] * (scores[1] / 0.2).log_softmax(1) + q[1] * (scores[0] / 0.2).log_softmax(1)).sum(1).mean() / 2
    torch.testing.assert_close(same, naive)
    assert same != expected


def test_the_queue_takes_part_in_assigning_and_in_nothing_else():
    scores, old = cosines(3), cosines(4, seed=7)
    rows = torch.cat([scores, old]) / 0.1
    loss = SwappedPrediction(3)(rows, NONE, LATE)
    assert loss.item() == pytest.approx(naive(scores, 3, (old[:2], old[2:])), abs=1e-5)
    early = SwappedPrediction(3)(rows, NONE, EARLY)
    assert early.item() == pytest.approx(naive(scores, 3), abs=1e-5)
    assert abs(loss - early) > 1e-3


def test_assignments_are_constants():
    z = (cosines(2) / 0.1).requires_grad_()
    SwappedPrediction(2)(z, NONE, LATE).backward()
    q = torch.stack([sinkhorn(z[1].detach() * 0.1), sinkhorn(z[0].detach() * 0.1)])
    torch.testing.assert_close(z.grad, (z.detach().softmax(-1) - q) / 24)


@pytest.mark.parametrize(
    "z", [torch.zeros(2, 12, 4), torch.eye(4)[:1].expand(2, 12, 4) * 10], ids=["flat", "one cluster"]
)
def test_identical_images_are_spread_evenly(z):
    z = z.clone().requires_grad_()
    loss = SwappedPrediction(2)(z, NONE, LATE)
    loss.backward()
    expected = -z.detach()[0, 0].log_softmax(0).mean().item()  # the codes are uniform
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert loss.item() >= math.log(4) - 1e-5
    assert z.grad.isfinite().all()


def test_the_order_of_the_images_has_no_say():
    z, order = cosines(3) / 0.1, torch.randperm(12, generator=torch.Generator().manual_seed(0))
    loss = SwappedPrediction(3)
    torch.testing.assert_close(loss(z[:, order], NONE, LATE), loss(z, NONE, LATE))


def test_the_recipe():
    recipe = make_recipe("swav", n_clusters=7, n_heads=2, overcluster=3, crops=4)
    assert recipe.heads == (7, 7, 21, 21)
    assert recipe.views == ("clean", "strong", "small", "small")
    assert recipe.rivals == [0, 1]
    assert make_recipe("swav", n_clusters=7, n_heads=2, overcluster=1).heads == (7, 7)
    assert make_recipe("swav", n_clusters=600).least_batch == 250  # with its queue
    assert make_recipe("swav", n_clusters=600, queue=0.0).least_batch == 3000
    with pytest.raises(ValueError, match="crops must be at least 2; got 1"):
        make_recipe("swav", crops=1)


def test_the_queue_is_used_where_the_batch_is_small():
    shapes = []

    def spy(objective, logits, labels, clock):
        shapes.append(logits.shape)
        return objective(logits, labels, clock)

    class Spy(SwappedPrediction):
        def __call__(self, logits, labels, clock):
            return spy(super().__call__, logits, labels, clock)

    for queue, rows in ((1.5, 2), (30.0, 6)):
        recipe = replace(make_recipe("swav", n_clusters=3, overcluster=1, n_heads=1, queue=queue), objective=Spy())
        fit(make_model(recipe), tiny_store(), recipe, Training(epochs=2, batch_size=32, lr=0.01))
        assert shapes[-1] == (rows, 32, 3)  # 90 images are a batch and two more, of each view
        shapes.clear()


def test_a_saved_head_knows_its_temperature():
    head, x = Prototypes(6, 5, temperature=0.1), torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    other = Prototypes(6, 5)
    other.load_state_dict(head.state_dict())
    naive = torch.stack([F.cosine_similarity(x, w[None], dim=1) for w in head.weight], 1) / 0.1
    torch.testing.assert_close(other(x), naive)


def test_small_crops_of_tiny_images_train():
    recipe = make_recipe("swav", n_clusters=3, crops=4)
    state = fit(make_model(recipe), tiny_store(), recipe, Training(epochs=1, batch_size=32, lr=0.01))
    assert isinstance(state.network, Queued)
    assert state.head_losses.isfinite().all()


# --- the queue ---


def seen(n, seed):
    rng = torch.Generator().manual_seed(seed)
    return [torch.rand(n, 1, 8, 8, generator=rng) for _ in range(3)]


def queued(images):
    return Queued(make_model(make_recipe("swav", n_clusters=3, n_heads=1, overcluster=2)), images)


def test_the_last_batches_are_scored_by_the_heads_of_today():
    network = queued(20).train()  # a batch of 8 and two more
    past = []
    for step in range(5):
        with torch.no_grad():
            for head in network.model.heads:
                head.weight.add_(0.1 * torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(step)))
        views = seen(8, step)
        features = network.model.features(views).detach()
        logits = network(views)
        for z, head in zip(logits, network.model.heads, strict=True):
            assert z.shape == (3 if step < 2 else 7, 8, head.out_features)
            torch.testing.assert_close(z[:3], head(features))
            for v in range(2):  # both batches, in whatever order
                old = {tuple(row) for row in z[3 + 2 * v : 5 + 2 * v].detach().flatten(0, 1).tolist()}
                want = {tuple(row) for batch in past[-2:] for row in head(batch[v]).tolist()} if step > 1 else set()
                assert len(old) == len(want) == (16 if step > 1 else 0)
                pairs = zip(sorted(old), sorted(want), strict=True)
                assert all(a == pytest.approx(b, abs=1e-4) for a, b in pairs)
        past.append(features)


def test_the_past_has_no_gradient():
    network = queued(10).train()
    network(seen(8, 0))
    z = network(seen(8, 1))[0]
    z[3:].sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in network.parameters())


def test_evaluation_neither_uses_nor_fills_the_queue():
    network = queued(10).train()
    network(seen(8, 0))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert network.eval()(seen(8, 1))[0].shape == (3, 8, 3)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("images", [0, 5, 8])
def test_a_batch_that_suffices_needs_no_queue(images):
    network = queued(images).train()
    for step in range(3):
        assert network(seen(8, step))[0].shape == (3, 8, 3)
    assert network.batches == 0
