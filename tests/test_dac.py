"""DAC: which pairs are selected, what they cost, and that two processes see the pairs of the whole batch."""

import math
import os
from itertools import pairwise as neighbours
from pathlib import Path

import pytest
import torch
from tiny import make_model, tiny_store, two_ranks
from torch import nn

from deepcluster import dist
from deepcluster.assign import Argmax
from deepcluster.losses import marginal_entropy, pair_labels, pairwise, similarities
from deepcluster.methods.dac import Pairs, spread, thresholds
from deepcluster.methods.imsat import Information
from deepcluster.model import Standardised
from deepcluster.recipe import PAPER, Clock, Targets, make_recipe
from deepcluster.trainer import Training, fit

P = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9]])
SURE = torch.eye(4).repeat(5, 1) * 1e4  # logits of one-hot assignments, each cluster 5 times
START, END = Clock(0, 100), Clock(99, 100, 999, 1000)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- similarities and labels ---


def test_similarities_by_hand():
    s = similarities(P.log(), P.log())
    torch.testing.assert_close(s[[0, 0, 1], [1, 2, 2]], torch.tensor([0.9910, 0.2195, 0.3482]), atol=5e-5, rtol=0)
    torch.testing.assert_close(s.diagonal(), torch.ones(3))
    one_hot, flat = torch.tensor([1e4] + [0.0] * 9), torch.zeros(10)
    assert similarities(one_hot[None], flat[None]).item() == pytest.approx(0.316228, abs=1e-6)


def test_labels_of_pairs_by_hand():
    labels = pair_labels(similarities(P.log(), P.log()), 0.95, 0.455)
    assert labels.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert pair_labels(torch.tensor([0.2, 0.5, 0.95, 0.96]), 0.95, 0.5).tolist() == [0, -1, -1, 1]


def test_flat_assignments_belong_together_and_balanced_ones_one_time_in_k():
    assert (pair_labels(similarities(torch.zeros(6, 10), torch.zeros(6, 10)), 0.95, 0.455) == 1).all()
    labels = pair_labels(similarities(SURE, SURE), 0.95, 0.455)
    assert (labels == 1).float().mean().item() == 1 / 4
    assert (labels == 0).float().mean().item() == 3 / 4


def test_thresholds_are_the_papers():
    for t, upper, lower in ((0, 0.95, 0.455), (0.0099, 0.9401, 0.45599), (45 * 0.0099, 0.5045, 0.49955)):
        assert thresholds(t) == pytest.approx((upper, lower), abs=1e-9)
    assert thresholds(0.45) == pytest.approx((0.5, 0.5), abs=1e-12)


def test_ever_more_pairs_are_selected_until_all_are():
    s = similarities(*[normal(60, 4) * 2] * 2)
    seen = [pair_labels(s, *thresholds(0.45 * i / 20)) for i in range(21)]
    for labels in seen:
        assert torch.equal(labels, labels.T)
        assert (labels.diagonal() == 1).all()
    for now, then in neighbours(seen):
        assert (then[now == 1] == 1).all()
        assert (then[now == 0] == 0).all()
    assert (seen[0] == -1).float().mean() > 0.3
    assert (seen[-1] != -1).all()


# --- the loss ---


def test_the_loss_by_hand():
    loss = pairwise(P.log(), P.log(), P.log(), upper=0.95, lower=0.455)
    assert loss.item() == pytest.approx(0.152196, abs=2e-6)  # the offset in the logarithms is 1e-6


def naive(labelling, first, second, upper, lower):
    unit = lambda z: torch.nn.functional.normalize(z.double().softmax(1), dim=1)
    label, one, other = unit(labelling), unit(first), unit(second)
    costs = []
    for i in range(len(first)):
        for j in range(len(second)):
            given, learnt = float(label[i] @ label[j]), float(one[i] @ other[j])
            if given > upper:
                costs.append(-math.log(learnt))
            elif given < lower:
                costs.append(-math.log(1 - learnt))
    return sum(costs) / len(costs)


def test_the_loss_is_the_mean_over_selected_pairs_of_what_others_say():
    labelling, first, second = normal(20, 5) * 2, normal(20, 5, seed=1), normal(20, 5, seed=2)
    for upper, lower in ((0.95, 0.455), (0.7, 0.2), (0.5, 0.5)):
        for one, other in ((first, second), (first, first), (labelling, second)):
            found = pairwise(labelling, one, other, upper=upper, lower=lower).item()
            assert found == pytest.approx(naive(labelling, one, other, upper, lower), abs=1e-5)


def test_pairs_left_out_have_no_gradient_and_labels_never_have():
    labelling = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0.5, 0.5]]).requires_grad_()
    s = similarities(labelling, labelling)
    assert s[0, 1] < 0.1 < 0.3 < s[1, 2] < 0.8 < 0.9
    logits = normal(3, 3).requires_grad_()
    pairwise(labelling, logits, logits, upper=0.95, lower=0.2).backward()
    assert labelling.grad is None
    assert logits.grad[2].abs().max() < 1e-7  # image 2 is sure of no other; like itself it is but for rounding
    assert (logits.grad[:2].abs().amax(1) > 0.01).all()
    moved = logits.detach().clone()
    moved[2] = torch.tensor([5.0, -3.0, 1.0])
    moved.requires_grad_()
    pairwise(labelling, moved, moved, upper=0.95, lower=0.2).backward()
    assert torch.equal(moved.grad[:2], logits.grad[:2])
    nothing = pairwise(labelling, logits, logits, upper=2.0, lower=-1.0)
    assert nothing == 0
    nothing.backward()


COLLAPSED = {
    "all in one cluster": torch.tensor([[1e4, 0, 0, 0]]).repeat(8, 1),
    "all equal": torch.zeros(8, 4),
    "sure": SURE[:8],
}


@pytest.mark.parametrize("logits", COLLAPSED.values(), ids=COLLAPSED.keys())
@pytest.mark.parametrize("options", [{}, {"star": True}, {"across": False}], ids=str)
def test_collapsed_batches_give_finite_numbers(logits, options):
    views = torch.stack([logits, logits.flip(0), logits.flip(0)]).requires_grad_()
    for clock in (START, END):
        loss = Pairs(**options)(views, torch.zeros(8), clock)
        loss.backward()
        assert loss.isfinite()
        assert views.grad.isfinite().all()


def test_total_disagreement_is_finite_and_has_a_slope():
    logits = (SURE[:8] / 1e4 * 20).requires_grad_()
    loss = pairwise(torch.zeros(8, 4), logits, logits, upper=0.95, lower=0.455)
    loss.backward()
    assert 5 < loss < -math.log(1e-6)
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().max() > 0


@pytest.mark.parametrize("objective", [Pairs(), Pairs(star=True), Information()], ids=str)
def test_names_of_clusters_and_the_order_of_images_do_not_matter(objective):
    logits, names, order = normal(3, 20, 5) * 2, [3, 1, 4, 0, 2], torch.arange(20).flip(0)
    loss = objective(logits, torch.zeros(20), Clock(3, 10))
    for same in (logits[..., names], logits[:, order]):
        torch.testing.assert_close(objective(same, torch.zeros(20), Clock(3, 10)), loss)


def test_the_objective_learns_the_pairs_of_view_0_on_the_others():
    for across in (False, True):
        logits = (normal(3, 20, 5) * 2).requires_grad_()
        loss = Pairs(0.0, across)(logits, torch.zeros(20), Clock(5, 10))
        image, *views = logits.detach()
        expected = [naive(image, image if across else z, z, *thresholds(0.225)) for z in views]
        assert loss.item() == pytest.approx(sum(expected) / 2, abs=1e-4)  # similarities near 1: the offset shows
        loss.backward()
        assert (logits.grad[0] != 0).any(-1).all() == across
        assert (logits.grad[0] == 0).all() == (not across)
        assert (logits.grad[1:] != 0).any(-1).all()


def test_balance_adds_what_the_use_of_clusters_lacks_of_log_k():
    for name, lack in (("all in one cluster", math.log(4)), ("all equal", 0), ("sure", 0)):
        logits = torch.stack([COLLAPSED["all equal"], COLLAPSED[name]])
        without, added = (Pairs(balance=b)(logits, torch.zeros(8), START) for b in (0.0, 2.0))
        assert (added - without).item() == pytest.approx(2 * lack, abs=1e-5)


def test_star_has_one_threshold_and_pulls_assignments_to_the_clean_ones():
    logits = normal(2, 20, 5) * 2
    without = Pairs(balance=0.0, across=False, star=True, auxiliary=0.0)
    for clock, threshold in ((START, 0.9), (Clock(50, 100), 0.7)):
        found = without(logits, torch.zeros(20), clock).item()
        assert found == pytest.approx(naive(logits[0], logits[1], logits[1], threshold, threshold), abs=1e-5)
    target, p = (torch.nn.functional.normalize(z.softmax(1), dim=1) for z in logits)
    cross = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    both = Pairs(balance=0.0, across=False, star=True, auxiliary=3.0)(logits, torch.zeros(20), START)
    torch.testing.assert_close(both - without(logits, torch.zeros(20), START), 3 * cross, atol=1e-4, rtol=1e-4)


def test_autocast_does_not_reach_the_loss():
    logits = normal(2, 20, 5)
    with torch.autocast("cpu", torch.bfloat16):
        inside = Pairs()(logits, torch.zeros(20), START)
    assert inside.dtype == torch.float32
    assert inside.item() == pytest.approx(Pairs()(logits, torch.zeros(20), START).item(), abs=1e-6)


def test_the_paper_preset_has_one_head_and_no_balance():
    params = {key: value for key, value in PAPER["dac"].items() if key not in ("lr", "batch_size")}
    recipe = make_recipe("dac", **params)
    assert recipe.heads == (10,)
    assert recipe.objectives[0] == Pairs(balance=0, across=False)


@pytest.mark.parametrize("k", [2, 3, 5, 9, 50])
def test_many_pairs_start_out_unlike_however_few_the_clusters(k):
    apart = []
    for make in (spread, Standardised):
        torch.manual_seed(0)
        s = similarities(*[make(16, k)(normal(400, 16))] * 2)
        apart.append((s < thresholds(0)[1]).float().mean().item())
    assert apart[0] > 0.3
    assert (apart[1] < apart[0]) if k < 9 else (apart[1] == apart[0])


# --- two processes: what DAC, UIC and IMSAT share among ranks, in one pair of gloo processes ---


def mine(x, dim=0):
    lo, hi = dist.shard(x.shape[dim])
    return x.narrow(dim, lo, hi - lo)


def results():
    """What this process computes of its share, put together again: the same for any number of processes."""
    out = {}
    for name, objective in (("dac", Pairs()), ("star", Pairs(across=False, star=True)), ("imsat", Information())):
        weight = torch.eye(5).requires_grad_()
        logits = mine(normal(3, 30, 5) * 2, 1) @ weight
        loss = objective(logits, torch.zeros(logits.shape[1]), Clock(3, 10))
        loss.backward()
        out[name] = dist.all_sum(loss.detach()) / dist.world()
        out[f"{name} gradient"] = dist.all_sum(weight.grad) / dist.world()
    out["uneven"] = pairwise(*(mine(normal(31, 5, seed=i)) for i in range(3)), upper=0.8, lower=0.3)
    out["marginal entropy"] = marginal_entropy(mine(normal(31, 5)))
    heads = [nn.Linear(8, 4), nn.Linear(8, 40)]
    for n, head in enumerate(heads):
        head.weight.data, head.bias.data = normal(head.out_features, 8, seed=n), torch.zeros(head.out_features)
    features = mine(normal(301, 8))
    first = Argmax()(features, heads, Targets.unlabelled(2, 301), 1)
    out["first labels"], out["labels"] = first.labels, Argmax()(features, heads, first, 2).labels
    out["standardised labels"] = Argmax(standardised=True)(features, heads, first, 2).labels
    return out


def work(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.setup("cpu")
    trained = {}
    for name in ("dac", "uic", "imsat"):
        recipe = make_recipe(name, n_clusters=3)
        state = fit(make_model(recipe), tiny_store(97), recipe, Training(2, 32, lr=0.01))
        trained |= {f"{name} {key}": value for key, value in state.network.state_dict().items()}
        trained |= {f"{name} losses": state.head_losses, f"{name} labels": state.targets.labels}
    torch.save({"results": results(), "trained": trained}, Path(folder) / f"{rank}.pt")
    dist.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return two_ranks(work, folder)


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes_compute_what_one_computes(pair):
    for key, expected in results().items():
        for rank in range(2):
            torch.testing.assert_close(pair[rank]["results"][key], expected, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.slow
@pytest.mark.ddp
def test_processes_that_train_together_agree(pair):
    first, second = (p["trained"] for p in pair)
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
