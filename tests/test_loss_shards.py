"""Losses of a batch in shards of unequal size, one a rank, are those of the whole batch; ranks are threads.

Every rank gets the same value, and ``world()`` times its share of the gradient: the average over ranks is the gradient.
"""

import pytest
import torch
import torch.nn.functional as F
from tiny import in_threads

from deepcluster import dist, losses
from deepcluster.methods.byol import Agreement
from deepcluster.methods.dac import Pairs
from deepcluster.methods.fixmatch import Match
from deepcluster.methods.imsat import Information
from deepcluster.methods.meanteacher import Consistency
from deepcluster.methods.pseudolabel import PseudoLabel
from deepcluster.methods.selflabel import SureLabels
from deepcluster.methods.swav import SwappedPrediction
from deepcluster.methods.vat import Smoothness
from deepcluster.recipe import Clock

B, K, LATE = 11, 5, Clock(1, 2, 1, 2)  # 2 ranks have 5 and 6 images, 4 have 2, 3, 3 and 3
QUEUE = F.normalize(torch.randn(7, K, generator=torch.Generator().manual_seed(9)), dim=1)
unit = lambda z: F.normalize(z, dim=-1)
sure = lambda z: 4 * z
LOSSES = {
    "agreement": (4, lambda z, y: Agreement()(z, y, LATE)),
    "balanced_pseudo_label": (1, lambda z, y: losses.balanced_pseudo_label(z[0], y)),
    "conditional_entropy": (2, lambda z, y: losses.conditional_entropy(z)),
    "contrastive": (2, lambda z, y: losses.contrastive(*unit(z))),
    "divergence": (2, lambda z, y: losses.divergence(z[0], z[1])),
    "few_labels": (1, lambda z, y: losses.few_labels(z[0], y)),
    "fixmatch": (2, lambda z, y: Match(threshold=0.6)(sure(z), y, LATE)),
    "imsat": (3, lambda z, y: Information()(z, y, LATE)),
    "info_nce": (2, lambda z, y: losses.info_nce(*unit(z), QUEUE, places=9)),
    "marginal_entropy": (2, lambda z, y: losses.marginal_entropy(z)),
    "masked_mean": (1, lambda z, y: losses.masked_mean(z[0, :, 0], y >= 0)),
    "meanteacher": (4, lambda z, y: Consistency()(z, y, LATE)),
    "mutual_information": (2, lambda z, y: losses.mutual_information(*z.softmax(-1))),
    "neighbour_consistency": (2, lambda z, y: losses.neighbour_consistency(*z)),
    "pairwise": (3, lambda z, y: losses.pairwise(*z, upper=0.7, lower=0.3)),
    "pairs of dac*": (3, lambda z, y: Pairs(star=True)(z, y, LATE)),
    "pseudo_label": (2, lambda z, y: losses.pseudo_label(z, y)),
    "pseudolabel": (1, lambda z, y: PseudoLabel()(z, y, LATE)),
    "selflabel": (2, lambda z, y: SureLabels(0.8, 0.3)(sure(z), y, LATE)),
    "swapped_prediction": (3, lambda z, y: losses.swapped_prediction(z, z[:2].detach().softmax(-1))),
    "swav": (5, lambda z, y: SwappedPrediction(3)(unit(z), y, LATE)),
    "uda": (2, lambda z, y: Match(temperature=0.4, threshold=0.5, tsa="linear")(z, y, LATE)),
    "vat": (2, lambda z, y: Smoothness()(z, y, LATE)),
    "view_number": (3, lambda z, y: losses.view_number(z)),
}


def batch(views):
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(K, (B,), generator=rng)
    labels[:6] = -1  # the first ranks have no labelled image at all
    return torch.randn(views, B, K, generator=rng), labels


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_and_its_gradient_are_those_of_the_whole_batch(name, n, monkeypatch):
    views, loss = LOSSES[name]
    z, labels = batch(views)
    expected = loss(z.requires_grad_(), labels)
    expected.backward()
    assert z.grad.abs().max() > 0

    def on_one_rank():
        lo, hi = dist.shard(B)
        part = z.detach()[:, lo:hi].clone().requires_grad_()
        value = loss(part, labels[lo:hi])
        value.backward()
        return value.detach(), dist.all_cat(part.grad.transpose(0, 1).contiguous() / n).transpose(0, 1)

    for value, slope in in_threads(n, on_one_rank, monkeypatch):
        torch.testing.assert_close(value, expected.detach(), rtol=2e-6, atol=1e-6)
        torch.testing.assert_close(slope, z.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["few_labels", "pseudo_label", "balanced_pseudo_label"])
def test_a_batch_without_labels_costs_nothing_on_any_rank(name, monkeypatch):
    z, _ = batch(1)

    def on_one_rank():
        lo, hi = dist.shard(B)
        part = z[:, lo:hi].clone().requires_grad_()
        value = LOSSES[name][1](part, torch.full((hi - lo,), -1))
        value.backward()
        return float(value.detach()), float(part.grad.abs().max())

    assert in_threads(4, on_one_rank, monkeypatch) == [(0.0, 0.0)] * 4
