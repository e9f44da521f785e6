"""SCAN and self-labelling: what is shown, what is learned, and when nothing is."""

import math

import pytest
import torch
from tiny import make_model, tiny_store

from deepcluster.losses import balanced_pseudo_label
from deepcluster.methods.scan import NeighbourConsistency
from deepcluster.methods.selflabel import SureLabels
from deepcluster.recipe import Clock, make_recipe
from deepcluster.stages import Plan, Stage, run
from deepcluster.trainer import Training, fit

CLOCK, NONE = Clock(1, 2), torch.full((8,), -1)


def logits(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


# --- SCAN ---


def test_an_image_and_its_neighbour_are_compared():
    z = torch.tensor([[[2.0, 0], [0, 1]], [[1, 0], [0, 3]]])
    assert NeighbourConsistency()(z, NONE, CLOCK).item() == pytest.approx(-3.041820, abs=1e-6)
    assert NeighbourConsistency(0.0)(z, NONE, CLOCK).item() == pytest.approx(0.367651, abs=1e-6)
    z = logits(2, 8, 3)  # of the numbers above, those of the image with itself would by chance be the same
    naive = -(z[0].softmax(1) * z[1].softmax(1)).sum(1).log().mean()
    torch.testing.assert_close(NeighbourConsistency(0.0)(z, NONE, CLOCK), naive)


def test_partners_are_the_nearest_of_the_features_at_the_start():
    recipe, seen = make_recipe("scan", n_clusters=3, neighbours=5), []
    fit(make_model(recipe), tiny_store(), recipe, Training(epochs=2, batch_size=32, lr=0.01),
        [lambda r: seen.append((r.refreshed, r.state.targets.partners))])  # fmt: skip
    assert [refreshed for refreshed, _ in seen] == [True, False]
    partners = seen[0][1]
    assert torch.equal(partners, seen[1][1])
    assert partners.shape == (96, 5)
    assert not (partners == torch.arange(96)[:, None]).any()


def test_the_recipe_of_scan():
    recipe = make_recipe("scan", n_clusters=7, n_heads=2)
    assert recipe.heads == (7, 7)
    assert recipe.rivals == [0, 1]
    assert recipe.least_batch == 28
    assert recipe.views == ("clean", "strong")


# --- self-labelling ---


def test_only_what_the_first_view_is_sure_of_is_learned_from_the_second():
    weak, strong = logits(8, 3), logits(8, 3, seed=1)
    weak[:3] = torch.eye(3)[[0, 0, 2]] * 20
    z = torch.stack([weak, strong]).requires_grad_()
    loss = SureLabels(least=0.0)(z, NONE, CLOCK)
    loss.backward()
    naive = [-strong.log_softmax(1)[i, c] for i, c in ((0, 0), (1, 0), (2, 2))]
    torch.testing.assert_close(loss.detach(), ((naive[0] + naive[1]) / 2 + naive[2]) / 2)
    assert (z.grad[0] == 0).all()
    assert (z.grad[1, 3:] == 0).all()
    assert (z.grad[1, :3] != 0).all()


def test_nothing_sure_is_no_loss_and_no_gradient():
    z = logits(2, 8, 3, scale=0.1).requires_grad_()
    loss = SureLabels(least=0.0)(z, NONE, CLOCK)
    loss.backward()
    assert loss == 0
    assert (z.grad == 0).all()


def test_at_least_a_share_of_every_cluster_is_learned():
    weak, strong = logits(24, 3), logits(24, 3, seed=1)
    sure, cluster = weak.softmax(1).max(1)
    targets = torch.full((24,), -1)
    for c in range(3):
        members = (cluster == c).nonzero()[:, 0]
        few = math.ceil(0.25 * len(members))
        targets[members[sure[members].argsort(descending=True)[:few]]] = c
    assert (targets >= 0).sum() > 3
    loss = SureLabels(least=0.25)(torch.stack([weak, strong]), NONE, CLOCK)
    torch.testing.assert_close(loss, balanced_pseudo_label(strong, targets))
    certain = torch.stack([weak * 1000, strong])  # more than a quarter is: the share changes nothing
    assert SureLabels(least=0.25)(certain, NONE, CLOCK) == SureLabels(least=0.0)(certain, NONE, CLOCK)
    lonely = torch.stack([torch.eye(3)[:1].repeat(24, 1), strong])  # two clusters are empty
    assert SureLabels(least=0.25)(lonely, NONE, CLOCK).isfinite()


@pytest.mark.parametrize(
    "z", [torch.zeros(2, 8, 3), torch.eye(3)[:1].expand(2, 8, 3) * 100], ids=["flat", "one cluster"]
)
def test_a_collapsed_batch_has_a_finite_gradient(z):
    z = z.clone().requires_grad_()
    loss = SureLabels()(z, NONE, CLOCK)
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()


def test_the_order_of_the_images_has_no_say():
    z, order = logits(2, 8, 3, scale=4), torch.tensor([3, 1, 7, 0, 6, 2, 5, 4])
    for objective in (SureLabels(0.8), NeighbourConsistency()):
        torch.testing.assert_close(objective(z[:, order], NONE, CLOCK), objective(z, NONE, CLOCK))


def test_the_last_stage_goes_on_with_the_clusters_of_the_one_before():
    stages = (
        Stage("scan", {"n_clusters": 3, "n_heads": 2}, 1, 32, 0.01),
        Stage("selflabel", {"n_clusters": 3, "least": 0.0}, 1, 32, 0.0),
    )
    plan = Plan(stages, 3, "convnet", None, None, (1, 8, 8), 0, False)
    heads = []

    def look(report):
        best = report.state.reported(report.recipe.rivals)
        heads.append(report.state.model.heads[best].weight.detach().clone())

    _, recipe, state = run(plan, tiny_store(), hooks=[look], quiet=True)
    assert recipe.heads == (3,)
    assert torch.equal(heads[0], heads[1])  # at a learning rate of 0 nothing moves
    assert math.isfinite(float(state.head_losses[0]))
