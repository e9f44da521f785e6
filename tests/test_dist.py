"""Two processes get what one gets. Everything runs in a single pair of gloo processes, compared part by part."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import make_model, tiny_store, two_ranks

import deepcluster.methods  # noqa: F401
from deepcluster import assign, dist, kmeans
from deepcluster.assign import Balanced, KMeans, whiten
from deepcluster.batches import train_batches
from deepcluster.features import extract
from deepcluster.losses import mutual_information
from deepcluster.recipe import Targets, make_recipe
from deepcluster.trainer import Training, fit
from deepcluster.transport import log_scales, sinkhorn

N = 301  # shards of 150 and 151 rows
EPOCHS, BATCH = 2, 32


# --- one process: everything is a no-op ---


def test_alone_every_helper_does_nothing():
    x = torch.arange(6.0).view(3, 2)
    for helper in (dist.all_sum, dist.all_max, dist.all_cat, dist.from_main):
        assert helper(x) is x
    dist.barrier()
    assert (dist.rank(), dist.world(), dist.is_main(), dist.shard(7)) == (0, 1, True, (0, 7))


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 7, 64])
def test_shards_are_contiguous_and_differ_by_one_row_at_most(n, world, monkeypatch):
    monkeypatch.setattr(dist, "world", lambda: world)
    shards = []
    for rank in range(world):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        shards.append(dist.shard(n))
    assert [start for start, _ in shards] == [0, *(stop for _, stop in shards[:-1])]
    assert shards[-1][1] == n
    lengths = [stop - start for start, stop in shards]
    assert max(lengths) - min(lengths) <= 1


def test_epoch_seeds_fit_in_31_bits_and_do_not_repeat():
    seeds = {dist.epoch_seed(seed, epoch) for seed in (0, 1, 2, 12345) for epoch in range(200)}
    assert len(seeds) == 800
    assert all(0 <= s < 2**31 - 1 for s in seeds)
    assert 0 <= dist.epoch_seed(2**40, 10**6) < 2**31 - 1


def test_the_device_is_checked(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert dist.setup("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert dist.setup("auto") == torch.device("cpu")
    for missing in ("cuda", "cuda:1", "mps", "abacus"):
        with pytest.raises(ValueError, match=rf"device '{missing}' is not available; choose from cpu or auto"):
            dist.setup(missing)


@pytest.mark.parametrize("wrong", ["cpu:x", "cpu:"])
def test_a_device_with_a_wrong_number(wrong):
    with pytest.raises(ValueError, match=f"device '{wrong}' is no device; choose cpu, cpu:NUMBER or auto"):
        dist.setup(wrong)


# --- two processes ---


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def mine(x):
    lo, hi = dist.shard(len(x))
    return x[lo:hi]


def blobs(d=8, k=6):
    return normal(k, d, 1)[torch.arange(N) % k] * 2 + normal(N, d, 2)


def results():
    """What this process computes from its shard, put together again: the same for any number of processes."""
    out = {}
    # sums, with gradients
    weight = torch.tensor([1.0, -2.0], requires_grad=True)
    dist.all_sum((mine(normal(N, 2)) * weight).sum(0)).square().sum().backward()
    out["all_sum gradient"] = dist.all_sum(weight.grad) / dist.world()  # the average, as DistributedDataParallel does
    p, q = normal(N, 5).softmax(1), normal(N, 5, 1).softmax(1)
    mixed = torch.eye(5).requires_grad_()
    loss = mutual_information((mine(p) @ mixed).softmax(1), mine(q))
    loss.backward()
    out["mutual information"] = loss.detach()
    out["mutual information gradient"] = dist.all_sum(mixed.grad) / dist.world()
    # transport
    out["sinkhorn"] = dist.all_cat(sinkhorn(mine(normal(N, 5)), epsilon=0.2, iterations=5))
    z = mine(normal(N, 7))
    scale, entropy = log_scales(lambda: z.split(40), 3.0, torch.zeros(7), tolerance=0, iterations=50)
    out["log_scales"], out["entropy"] = scale, torch.tensor(entropy)
    # k-means
    x = blobs()
    for name, k, options in (
        ("plus plus", 6, {}),
        ("many", 20, {}),
        ("spherical", 6, {"spherical": True}),
        ("warm", 6, {"start": x[:6]}),
    ):
        shard = mine(torch.nn.functional.normalize(x, dim=1) if name == "spherical" else x)
        labels, centroids = kmeans.kmeans(shard, k, seed=3, **options)
        out[f"kmeans {name} labels"], out[f"kmeans {name} centroids"] = dist.all_cat(labels), centroids
    uneven = x[:40] if dist.rank() == 0 else x[40:]
    uneven = x if dist.world() == 1 else uneven
    out["kmeans uneven centroids"] = kmeans.kmeans(uneven, 6, seed=3)[1]
    limit, kmeans.PLUS_PLUS = kmeans.PLUS_PLUS, 0
    out["kmeans random centroids"] = kmeans.kmeans(mine(x), 6, seed=3)[1]
    kmeans.PLUS_PLUS = limit
    few = x[:3] if dist.rank() == 0 else x[:0]  # a rank without rows
    out["kmeans few centroids"] = kmeans.kmeans(few, 2, seed=3)[1]
    # assigners
    y = dist.all_cat(whiten(mine(x), 5))
    out["whiten"] = y @ y.T  # the sign of a direction is free
    heads = [torch.nn.Linear(8, 4), torch.nn.Linear(8, 9)]
    for n, head in enumerate(heads):
        head.weight.data, head.bias.data = normal(head.out_features, 8, n), torch.zeros(head.out_features)
    previous = Targets.unlabelled(2, N)
    for name, assigner in (("KMeans", KMeans(5)), ("Aligned", assign.Aligned(KMeans(5))), ("Balanced", Balanced())):
        first = assigner(mine(x), heads, previous, 1)
        out[f"{name} labels"] = first.labels
        out[f"{name} labels again"] = assigner(mine(x), heads, first, 2).labels
    optimizer = torch.optim.SGD(heads[0].parameters(), 0.1)
    assign.centroid_heads(heads, optimizer, mine(x), replace(previous, labels=out["KMeans labels"]))
    out["centroid heads"] = heads[1].weight.data.clone()
    # batches and features
    store, recipe = tiny_store(97), make_recipe("deepcluster", n_clusters=3)
    targets = replace(Targets.unlabelled(2, 97), labels=(torch.arange(194).view(2, 97) % 5).int())
    batches = list(train_batches(store, targets, recipe, 31, seed=2))
    out["ids"] = torch.stack([dist.all_cat(b.ids) for b in batches])
    out["views"] = torch.stack([dist.all_cat(b.views[0]) for b in batches])
    model = make_model(recipe)
    out["features"] = dist.all_cat(extract(model, store, ("strong", "clean"), batch_size=13, seed=4))
    return out


def trained():
    """What every process knows after training together: has to be the same."""
    recipe = make_recipe("deepcluster", n_clusters=3)
    model = make_model(recipe)
    state = fit(model, tiny_store(97), recipe, Training(EPOCHS, BATCH, lr=0.01))
    out = {f"model {k}": v for k, v in model.state_dict().items()}
    return out | {"labels": state.targets.labels, "predicted": state.predicted, "losses": state.head_losses}


def work(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.setup("cpu")
    extra = {
        "shard": torch.tensor(dist.shard(N)),
        "all_cat": dist.all_cat(torch.full((2 + 3 * rank, 2), float(rank))),
        "all_cat of nothing": dist.all_cat(torch.full((3 * rank,), rank)),
        "all_sum": dist.all_sum(torch.tensor([1.0, 10.0]) * (rank + 1)),
        "all_max": dist.all_max(torch.tensor([1.0, -1.0]) * (rank + 1)),
        "from_main": dist.from_main(torch.tensor([5.0 + rank])),
        "is_main": torch.tensor(dist.is_main()),
    }
    torch.save({"results": results(), "trained": trained(), "extra": extra}, Path(folder) / f"{rank}.pt")
    dist.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return two_ranks(work, folder)


@pytest.fixture(scope="module")
def alone():
    return results()


@pytest.mark.ddp
def test_what_crosses_ranks(pair):
    for rank, extra in enumerate(p["extra"] for p in pair):
        assert extra["shard"].tolist() == [[0, 150], [150, 301]][rank]
        assert extra["all_cat"].tolist() == [[0, 0]] * 2 + [[1, 1]] * 5
        assert extra["all_cat of nothing"].tolist() == [1] * 3
        assert extra["all_sum"].tolist() == [3, 30]
        assert extra["all_max"].tolist() == [2, -1]
        assert extra["from_main"].tolist() == [5]
        assert extra["is_main"] == (rank == 0)


@pytest.mark.ddp
def test_two_processes_compute_what_one_computes(pair, alone):
    wrong = {}
    for key, expected in alone.items():
        for rank in range(2):
            found = pair[rank]["results"][key]
            assert found.shape == expected.shape, key
            if expected.dtype in (torch.int32, torch.int64):
                error = float((found != expected).float().mean())
                limit = 0.005 if key.startswith("Balanced") else 0  # a row in 200 may be a tie
            else:
                error, limit = float((found - expected).abs().max()), 1e-6 if key in ("log_scales", "entropy") else 1e-5
            if error > limit * max(1, float(expected.abs().max())):
                wrong[key, rank] = error
    assert not wrong


@pytest.mark.ddp
def test_processes_that_train_together_agree(pair):
    first, second = (p["trained"] for p in pair)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    seen = (first["predicted"] >= 0).float().mean().item()
    assert seen > 0.6  # balanced draws repeat some images and leave others out; one process's half would be less
