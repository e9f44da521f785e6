"""moco, byol and pcl: their losses by hand and against the formulae, and pcl's clusters."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from tiny import make_model, tiny_store
from torch import nn

import deepcluster.methods  # noqa: F401
from deepcluster.losses import info_nce, pseudo_label
from deepcluster.methods.byol import Agreement
from deepcluster.methods.moco import QueueContrast
from deepcluster.methods.pcl import Concentrate, ProtoNCE, Spherical, concentrations, directions
from deepcluster.methods.simclr import Contrastive
from deepcluster.model import Projector, ScaledCentroids
from deepcluster.recipe import PAPER, Clock, Targets, make_recipe
from deepcluster.trainer import Training, fit

NONE, NOW = torch.full((4,), -1), Clock(0, 1)
X, Y = torch.eye(2)


def units(n, d, seed):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


# --- InfoNCE with a queue ---


def test_info_nce_by_hand():
    """One right key, one of the batch, one of the queue: cosines 1, 0 and 0 over temperature 0.5."""
    loss = info_nce(torch.stack([X, X]), torch.stack([X, Y]), Y[None], temperature=0.5)
    e = math.exp(2)
    first, second = -math.log(e / (e + 1 + 1)), -math.log(1 / (1 + e + 1))
    assert loss.item() == pytest.approx((first + second) / 2, abs=1e-6)
    assert loss.item() == pytest.approx(1.2395449, abs=1e-6)


@pytest.mark.parametrize(("filled", "places"), [(0, 12), (5, 12), (12, 12), (12, None)])
def test_info_nce_of_equal_vectors_is_the_log_of_all_candidates_however_full_the_queue(filled, places):
    one = units(1, 6, 0)
    queue = torch.cat([one.repeat(filled, 1), torch.zeros(12 - filled, 6)])
    loss = info_nce(one.repeat(4, 1), one.repeat(4, 1), queue, places=places, temperature=0.07)
    assert loss.item() == pytest.approx(math.log(4 + 12), abs=1e-5)


@pytest.mark.parametrize("filled", [3, 10])
def test_info_nce_matches_the_sum_over_candidates(filled):
    u, k, old = units(5, 8, 0), units(5, 8, 1), units(filled, 8, 2)
    queue = torch.cat([torch.zeros(10 - filled, 8), old, torch.zeros(2, 8)])  # the last two only complete a row
    naive = 0.0
    for i in range(5):
        scores = [(u[i] @ other / 0.2).double().exp() for other in [*(k[j] for j in range(5) if j != i), *old]]
        right = (u[i] @ k[i] / 0.2).double().exp()
        naive -= (right / (right + sum(scores) / (4 + filled) * (4 + 10))).log() / 5
    assert info_nce(u, k, queue, places=10, temperature=0.2).item() == pytest.approx(naive.item(), abs=1e-5)


def test_info_nce_without_a_queue_is_the_cross_entropy_within_the_batch():
    u, k = units(6, 8, 0), units(6, 8, 1)
    loss = info_nce(u, k, torch.zeros(3, 8), places=0, temperature=0.2)
    torch.testing.assert_close(loss, F.cross_entropy(u @ k.T / 0.2, torch.arange(6)))


def test_info_nce_is_exact_under_autocast_and_finite_at_the_corners():
    u, k, queue = units(8, 16, 0), units(8, 16, 1), units(20, 16, 2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = info_nce(u, k, queue)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, info_nce(u, k, queue))
    equal = units(1, 16, 0).repeat(8, 1).requires_grad_()
    info_nce(equal, equal.detach(), torch.zeros(20, 16), temperature=0.01).backward()
    assert equal.grad.isfinite().all()


def test_moco_asks_every_view_for_the_teachers_other_view():
    u, v, ku, kv = (units(4, 8, seed) for seed in range(4))
    queue = units(12, 8, 4)
    z = torch.stack([u, v, ku, kv, *queue.view(3, 4, 8)])
    loss = QueueContrast(0.3, 12)(z, NONE, NOW)
    expected = (info_nce(u, kv, queue, temperature=0.3) + info_nce(v, ku, queue, temperature=0.3)) / 2
    torch.testing.assert_close(loss, expected)
    assert QueueContrast(0.3, 12)(torch.stack([u, v, v, u, *queue.view(3, 4, 8)]), NONE, NOW) < loss


def test_moco_remembers_as_much_as_it_was_asked_to():
    recipe = make_recipe("moco", n_clusters=3, queue=40, teacher=0.5)
    state = fit(make_model(recipe), tiny_store(), recipe, Training(epochs=1, batch_size=32))
    assert state.network.keys0.shape == (40, 128)
    assert (state.network.keys0 != 0).any(1).all()
    assert state.network.next == 96 % 40
    assert state.network.momentum == 0.5
    assert recipe.objective.queue == 40


# --- predicting the teacher ---


@pytest.mark.parametrize(("cosines", "loss"), [((1, 1), 0), ((-1, -1), 4), ((0, 0), 2), ((1, 0), 1)])
def test_agreement_is_two_minus_two_cosines_of_the_other_view(cosines, loss):
    turn = {1: X, 0: Y, -1: -X}
    z = torch.stack([X * 3, X * 0.5, turn[cosines[1]] * 7, turn[cosines[0]]])[:, None].repeat(1, 4, 1)
    assert Agreement()(z, NONE, NOW).item() == pytest.approx(loss, abs=1e-6)


def test_agreement_is_the_squared_distance_of_unit_vectors_and_pairs_views_crosswise():
    z = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    unit = [F.normalize(x, dim=1) for x in z]
    crosswise = ((unit[0] - unit[3]).square().sum(1).mean() + (unit[1] - unit[2]).square().sum(1).mean()) / 2
    torch.testing.assert_close(Agreement()(z, NONE, NOW), crosswise)


def test_agreement_has_no_gradient_for_the_teacher_and_a_bounded_one_at_zero():
    z = torch.randn(4, 4, 5, generator=torch.Generator().manual_seed(0))
    z[:2, 0] = 0
    z.requires_grad_()
    Agreement()(z, NONE, NOW).backward()
    assert (z.grad[2:] == 0).all()
    assert (z.grad[:2].abs().amax(-1) > 0).all()
    assert z.grad.abs().max() < 1e3


def test_byol_does_not_collapse():
    """Without negatives all features could become one; they keep their spread."""
    recipe, model = make_recipe("byol", n_clusters=3, teacher=0.9), None
    model = make_model(recipe)
    fit(model, tiny_store(), recipe, Training(epochs=30, batch_size=32, lr=0.01))
    with torch.no_grad():
        images = tiny_store().take(torch.arange(96)).float() / 255
        unit = model.train()([images])[0][0]
    assert unit.std(0).mean() > 0.3 / math.sqrt(unit.shape[1])  # 1 / sqrt(D) for vectors spread evenly


def test_the_papers_values_can_be_used():
    assert PAPER["moco"]["queue"] == 65536
    assert PAPER["byol"]["hidden"] == 4096
    byol = make_recipe("byol", hidden=48, projection=6)
    head = make_model(byol).heads[0]
    assert (head.hidden.out_features, head.out_features) == (48, 6)
    assert byol.network(make_model(byol)).predictors[0][0].out_features == 48


# --- prototypes ---

ROWS = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0.8, -0.6, 0], [0, 0, 1], [0, 0.6, 0.8], [0, 1, 0]])
LABELS = torch.tensor([0, 0, 0, 1, 1, 2])
CENTRES = torch.eye(3)[[0, 2, 1]]


def test_concentrations_by_hand():
    spread = math.sqrt(0.4)  # distance of two unit vectors whose cosine is 0.8
    phi = [2 * spread / (3 * math.log(13)), spread / (2 * math.log(12))]
    phi.append(max(phi))  # one image has no spread
    low, high = torch.tensor(phi).quantile(torch.tensor([0.1, 0.9])).tolist()
    phi = [min(max(p, low), high) for p in phi]
    expected = torch.tensor(phi) / sum(phi) * 3 * 0.2
    found = concentrations(ROWS, LABELS, CENTRES, temperature=0.2, alpha=10.0)
    torch.testing.assert_close(found, expected)
    assert found.mean().item() == pytest.approx(0.2, abs=1e-6)
    assert found[1] < found[0] == found[2]


def test_concentrations_of_tight_or_empty_clusters_are_positive():
    same = concentrations(CENTRES[LABELS], LABELS, CENTRES, temperature=0.1, alpha=10.0)
    torch.testing.assert_close(same, torch.full((3,), 0.1))
    empty = concentrations(ROWS, LABELS, torch.cat([CENTRES, torch.ones(4, 3)]), temperature=0.1, alpha=10.0)
    assert (empty > 0).all()
    assert (empty[3:] == empty.max()).all()


def test_directions_have_no_mean_and_one_spread_in_every_dimension():
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 9, 0.1, 0]) + 7
    unit, mean, variance = directions(x)
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(variance, x.var(0, unbiased=False), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(unit, F.normalize((x - mean) / (variance + 1e-5).sqrt(), dim=1), atol=1e-4, rtol=1e-4)
    assert directions(torch.ones(5, 3))[0].abs().max() == 0


def test_only_centroids_are_labelled_and_the_head_says_what_k_means_found():
    centres = 6 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    kind = torch.arange(80) % 4
    x = centres[kind] + torch.randn(80, 8, generator=torch.Generator().manual_seed(1)) + 20
    heads = [ScaledCentroids(8, 4), ScaledCentroids(8, 12), Projector(8, 5)]
    before = [p.clone() for p in heads[2].parameters()]
    targets = Spherical()(x, heads, Targets.unlabelled(3, 80), 0)
    assert targets.labels.dtype == torch.int32
    assert (targets.labels[2] == -1).all()
    assert len(targets.labels[1].unique()) == 12
    assert len({(int(a), int(b)) for a, b in zip(kind, targets.labels[0], strict=True)}) == 4
    Concentrate(0.3)(heads, torch.optim.SGD(heads[2].parameters(), 0.1), x, targets)
    for head, labels in zip(heads[:2], targets.labels, strict=False):
        assert torch.equal(head.eval()(x).argmax(1), labels.long())
        torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(head.out_features))
        assert head.phi.mean().item() == pytest.approx(0.3, abs=1e-6)
    torch.testing.assert_close(heads[0].train()(x), heads[0].eval()(x) * 0.3 / heads[0].phi, atol=1e-3, rtol=1e-3)
    assert all(torch.equal(p, q) for p, q in zip(before, heads[2].parameters(), strict=True))


def test_an_empty_cluster_keeps_its_centroid():
    head = ScaledCentroids(3, 4)
    before = head.weight.clone()
    labels = torch.tensor([[0, 0, 0, 1, 1, 2]], dtype=torch.int32)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)
    Concentrate()([head], optimizer, ROWS, Targets(labels, torch.arange(6)[:, None]))
    assert torch.equal(head.weight[3], before[3])
    assert not torch.equal(head.weight[:3], before[:3])


def test_clusters_keep_their_names_over_the_epochs():
    recipe, kept = make_recipe("pcl", n_clusters=4, overcluster=2), []
    store = tiny_store(200)
    store.data[:] = (torch.arange(200) % 4 * 60).to(torch.uint8).view(-1, 1, 1, 1) + store.data // 16
    labels = []
    fit(make_model(recipe), store, recipe, Training(epochs=5, batch_size=50, lr=1e-3),
        [lambda r: labels.append(r.state.targets.labels.clone())])  # fmt: skip
    for old, new in pairwise(labels):
        kept.append((old[0] == new[0]).float().mean())
        overlap = torch.bincount(old[0].long() * 4 + new[0].long(), minlength=16).view(4, 4)
        assert torch.equal(overlap.argmax(1), torch.arange(4))  # most of a cluster is under its old name
    assert min(kept) > 0.8


def test_pcl_is_info_nce_and_the_mean_of_its_prototype_terms():
    recipe = make_recipe("pcl", n_clusters=4, overcluster=3, contrast=0.3)
    assert recipe.heads == (4, 12, 128)
    assert recipe.rivals == [0]
    assert recipe.objectives == (ProtoNCE(2), ProtoNCE(2), Contrastive(0.3))
    z, y = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, -1])
    torch.testing.assert_close(ProtoNCE(2)(z, y, NOW), pseudo_label(z, y) / 2)
    assert make_recipe("pcl", n_clusters=4, overcluster=1).heads == (4, 128)
    assert make_recipe("pcl", n_clusters=4, overcluster=1).objectives[0] == ProtoNCE(1)


# --- all three ---


@pytest.mark.parametrize("name", ["moco", "byol", "pcl"])
@pytest.mark.parametrize("value", [0, 255])
def test_constant_images_give_finite_losses_and_weights(name, value):
    recipe, store = make_recipe(name, n_clusters=3), tiny_store(64)
    store.data[:] = value
    recipe = replace(recipe, views=("clean", "clean"))
    state = fit(make_model(recipe), store, recipe, Training(epochs=3, batch_size=32, lr=0.01))
    assert state.head_losses.isfinite().all()
    assert all(p.isfinite().all() and p.abs().max() < 1e3 for p in state.network.parameters())


@pytest.mark.parametrize("name", ["moco", "byol"])
def test_a_resumed_run_has_the_same_teacher_and_memory(name, tmp_path):
    from deepcluster import checkpoint

    recipe, training = make_recipe(name, n_clusters=3), Training(epochs=2, batch_size=32, lr=0.01)
    straight = fit(make_model(recipe), tiny_store(), recipe, training)
    stopped = []

    def stop(report):
        if report.clock.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(make_model(recipe), tiny_store(), recipe, replace(training, out=tmp_path), [stop])
    resumed = fit(make_model(recipe, 5), tiny_store(), recipe, training, [stopped.append],
                  resume=checkpoint.read(tmp_path / "last.pt"))  # fmt: skip
    assert len(stopped) == 1
    same = resumed.network.state_dict()
    assert all(torch.equal(value, same[key]) for key, value in straight.network.state_dict().items())
    assert any(key.startswith("teacher.") for key in same)
