"""Nearest neighbours against all pairs, over one process and two; and what two processes make of the methods here."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import make_model, tiny_store, two_ranks

import deepcluster.methods  # noqa: F401
from deepcluster import dist, neighbors
from deepcluster.losses import balanced_pseudo_label, neighbour_consistency
from deepcluster.methods.deepcluster_v2 import SphericalKMeans
from deepcluster.methods.selflabel import SureLabels
from deepcluster.methods.swav import SwappedPrediction
from deepcluster.model import Centroids
from deepcluster.neighbors import Neighbors, neighbours
from deepcluster.recipe import Clock, Targets, make_recipe
from deepcluster.trainer import Training, fit

N = 301  # shards of 150 and 151 rows


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive(x, k):
    """All pairs in float64."""
    cosines = F.normalize(x.double(), dim=1) @ F.normalize(x.double(), dim=1).T
    cosines.fill_diagonal_(-2)
    return cosines.argsort(dim=1, descending=True, stable=True)[:, :k]


@pytest.mark.parametrize("block", [2**15, 7])
@pytest.mark.parametrize("k", [1, 5, 49])
def test_neighbours_are_those_of_all_pairs(k, block, monkeypatch):
    monkeypatch.setattr(neighbors, "BLOCK", block)
    x = random(50, 6) * torch.arange(1, 51)[:, None]  # the length of a row has no say
    found = neighbours(x, k)
    assert found.dtype == torch.int64
    assert torch.equal(found, naive(x, k))


def test_what_an_accelerator_does_gives_the_same(monkeypatch):
    x = F.normalize(random(50, 6), dim=1)
    expected = x @ x[:9].T
    monkeypatch.setattr(neighbors, "SCORES", 100)  # several parts
    scores, index = neighbors._best(x, x[:9], 3)
    best = expected.topk(3)
    torch.testing.assert_close(scores, best.values)
    assert torch.equal(index, best.indices)


def test_a_row_is_no_neighbour_of_itself_however_many_are_equal():
    x = torch.cat([torch.ones(30, 4), random(10, 4)])
    found = neighbours(x, 5)
    assert found.shape == (40, 5)
    assert not (found == torch.arange(40)[:, None]).any()
    assert (found[:30] < 30).all()
    assert all(len(set(row)) == 5 for row in found.tolist())


def test_rows_of_zeros_have_neighbours_too():
    found = neighbours(torch.zeros(6, 3), 5)
    assert [sorted(row) for row in found.tolist()] == [[j for j in range(6) if j != i] for i in range(6)]


@pytest.mark.parametrize("k", [0, 6])
def test_more_neighbours_than_rows_are_refused(k):
    with pytest.raises(ValueError, match=f"between 1 and 5, the number of other rows; got {k}"):
        neighbours(random(6, 3), k)


def test_rows_that_are_not_finite_are_refused():
    x = random(6, 3)
    x[2, 1] = torch.inf
    with pytest.raises(FloatingPointError, match="not finite; lower lr"):
        neighbours(x, 2)


def test_the_index_finds_nearly_all_of_them():
    x = random(5000, 16)
    exact, fast = neighbours(x, 10), neighbours(x, 10, exact=False)
    hits = (fast[:, :, None] == exact[:, None, :]).any(2).float().mean().item()
    assert 0.8 < hits < 1  # it is not the exact search after all
    assert not (fast == torch.arange(len(x))[:, None]).any()


def test_the_index_is_used_above_a_size(monkeypatch):
    x = random(5000, 16)
    monkeypatch.setattr(neighbors, "EXACT", len(x))
    assert torch.equal(neighbours(x, 10), neighbours(x, 10, exact=True))
    monkeypatch.setattr(neighbors, "EXACT", len(x) - 1)
    assert torch.equal(neighbours(x, 10), neighbours(x, 10, exact=False))


def test_a_row_whose_cells_hold_too_little_is_its_own_neighbour():
    found = neighbours(random(3000, 4), 2999, exact=False)  # 32 of 46 cells cannot hold all others
    assert (found >= 0).all()
    assert (found == torch.arange(3000)[:, None]).any()
    own, found = torch.tensor([4, 5]), torch.tensor([[4, 7, 4], [6, 5, 9]])
    assert neighbors._without(own, found).tolist() == [[7, 4], [6, 9]]


def test_the_assigner_makes_partners_and_leaves_labels():
    x, before = random(30, 6), Targets(torch.full((2, 30), 3, dtype=torch.int32), torch.arange(30)[:, None])
    found = Neighbors(5)(x, [], before, 0)
    assert torch.equal(found.partners, naive(x, 5))
    assert torch.equal(found.labels, before.labels)
    assert Neighbors(50)(x, [], before, 0).partners.shape == (30, 29)


# --- two processes ---


def results():
    """Everything that must not depend on the number of processes: what this process has of it, put together."""
    lo, hi = dist.shard(N)
    x, z, w = random(N, 6), random(6, N, 5, seed=1), random(N, 5, seed=2)
    out = {"neighbours": dist.all_cat(neighbours(x[lo:hi], 7))}
    out["partners"] = Neighbors(7)(x[lo:hi], [], Targets.unlabelled(1, N), 0).partners
    torch.manual_seed(0)
    heads = [Centroids(6, 4), Centroids(6, 4)]
    out["labels"] = SphericalKMeans()(x[lo:hi], heads, Targets.unlabelled(2, N), 3).labels
    clock, none = Clock(1, 2), torch.full((N,), -1)
    losses = {
        "scan": lambda z: neighbour_consistency(z[0], z[1]),
        "swav": lambda z: SwappedPrediction(4)(F.normalize(z, dim=-1), none, clock),
        "selflabel": lambda z: SureLabels(0.6, 0.3)(z, none, clock),
        "balanced": lambda z: balanced_pseudo_label(z[0], w[lo:hi].argmax(1)),
    }
    for key, loss in losses.items():
        part = z[:, lo:hi].clone().requires_grad_()
        value = loss(part)
        value.backward()
        out[f"{key} loss"] = value.detach()[None]
        out[f"{key} grad"] = dist.all_cat(part.grad.transpose(0, 1).contiguous() / dist.world())  # DDP averages
    return out


def trained(name, **options):
    recipe = make_recipe(name, n_clusters=3, **options)
    model = make_model(recipe)
    state = fit(model, tiny_store(97), recipe, Training(2, 32, lr=0.01))
    out = {f"network {k}": v for k, v in state.network.state_dict().items()}
    return out | {"labels": state.targets.labels, "partners": state.targets.partners, "predicted": state.predicted}


def work(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.setup("cpu")
    runs = {"swav": {"queue": 40.0}, "deepcluster_v2": {}, "scan": {}, "selflabel": {}}
    saved = {"results": results(), "trained": {name: trained(name, **options) for name, options in runs.items()}}
    torch.save(saved, Path(folder) / f"{rank}.pt")
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
            torch.testing.assert_close(pair[rank]["results"][key], expected, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.parametrize("name", ["swav", "deepcluster_v2", "scan", "selflabel"])
def test_processes_that_train_together_agree(pair, name):
    first, second = (p["trained"][name] for p in pair)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
