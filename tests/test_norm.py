"""Batch norms over the rows of all ranks against torch's own over the whole batch; ranks are threads here."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import in_threads
from torch import nn

from deepcluster import dist
from deepcluster.networks import _undisturbed, parallel
from deepcluster.norm import Shared, batch_norm, deviation, moments

SHARES = {1: [10], 2: [3, 7], 4: [2, 0, 5, 3]}  # rows of each rank
OPTIONS = [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}, {"momentum": 0.3, "eps": 0.2}]
ranks = pytest.mark.parametrize("n", sorted(SHARES))
shapes = pytest.mark.parametrize("shape", [(5,), (5, 4), (5, 4, 3)], ids=["vectors", "rows", "images"])


def whole(shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(10, *shape, generator=rng, dtype=torch.float64) * 3 + 1


def mine(x):
    shares = SHARES[dist.world()]
    return x[sum(shares[: dist.rank()]) :][: shares[dist.rank()]]


def norm_of(shape, **options):
    torch.manual_seed(0)
    norm = (nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d)(5, **options).double()
    with torch.no_grad():
        for tensor in (t for t in norm.state_dict().values() if t.is_floating_point()):
            tensor.uniform_(0.5, 2)
    return norm


def learnt(norm, call, x, slope):
    """What two steps see and leave, of all ranks: outputs, gradients of input and parameters, running statistics."""
    x, seen = x.clone().requires_grad_(), {}
    for step in range(2):
        y = call(x * (1 + step))
        seen[f"output {step}"] = dist.all_cat(y.detach())
        (y * slope).sum().backward()
    grads = {key: dist.all_sum(p.grad) for key, p in norm.named_parameters()}  # as DistributedDataParallel adds them
    return seen | {"input": dist.all_cat(x.grad)} | grads | {f"new {k}": v for k, v in norm.state_dict().items()}


def assert_all_close(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-11, atol=1e-11, msg=lambda m, k=key: f"{k}: {m}")


@ranks
@shapes
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_torchs_norm_of_the_whole_batch(n, shape, options, monkeypatch):
    x, slope, norm = whole(shape), whole(shape, seed=1), norm_of(shape, **options)
    reference = copy.deepcopy(norm)
    expected = learnt(reference, reference, x, slope)

    def on_one_rank():
        own = copy.deepcopy(norm)
        return learnt(own, Shared(own), mine(x), mine(slope))

    for found in in_threads(n, on_one_rank, monkeypatch):
        assert_all_close(found, expected)


def test_evaluation_is_torchs_own(monkeypatch):
    x, norm = whole((5, 2, 2)), norm_of((5, 2, 2)).eval()
    before, expected = copy.deepcopy(norm.state_dict()), norm(x)
    for found in in_threads(2, lambda: dist.all_cat(Shared(norm)(mine(x)).detach()), monkeypatch):
        assert torch.equal(found, expected)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


def test_statistics_are_left_alone_where_a_model_is_undisturbed(monkeypatch):
    x, norm = whole((5,)), norm_of((5,))
    before = copy.deepcopy(norm.state_dict())
    with _undisturbed(norm):
        expected = norm(x)

        def on_one_rank():
            return dist.all_cat(Shared(norm)(mine(x)).detach())

        for found in in_threads(2, on_one_rank, monkeypatch):
            torch.testing.assert_close(found, expected)
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


def test_a_norm_of_another_kind_is_shared_too(monkeypatch):
    class Rectified(nn.BatchNorm1d):  # as timm's, which does more than its parent
        def forward(self, x):
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, 0.1, self.eps).relu()

    x, norm = whole((5,)), Rectified(5).double()
    expected = copy.deepcopy(norm)(x)

    def on_one_rank():
        return dist.all_cat(Shared(copy.deepcopy(norm))(mine(x)).detach())

    for found in in_threads(4, on_one_rank, monkeypatch):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("n", [2, 4])
def test_a_mean_far_from_zero_costs_no_precision(n, monkeypatch):
    x = (whole((5,)) + 1e4).float()  # E x^2 - (E x)^2 would be off by a tenth
    expected = x.double().var(0, correction=0)
    for count, mean, variance in in_threads(n, lambda: moments(mine(x)), monkeypatch):
        assert count == 10
        torch.testing.assert_close(mean, x.double().mean(0), rtol=1e-7, atol=0)
        torch.testing.assert_close(variance, expected, rtol=1e-5, atol=0)


def test_bfloat16_rows_have_float32_statistics(monkeypatch):
    x, slope = (t.to(torch.bfloat16) for t in (whole((5, 3, 3)) + 20, whole((5, 3, 3), 1)))
    weights = [torch.rand(5).requires_grad_() for _ in range(2)]
    expected = F.batch_norm(x.float(), None, None, *weights, True)
    (expected * slope.float()).sum().backward()

    def on_one_rank():
        part, own = mine(x).requires_grad_(), [w.detach().requires_grad_() for w in weights]
        y = batch_norm(part, None, None, *own, True)
        (y * mine(slope)).sum().backward()
        assert y.dtype == part.grad.dtype == torch.bfloat16
        return dist.all_cat(y.detach()), [dist.all_sum(w.grad) for w in own]

    for found, grads in in_threads(2, on_one_rank, monkeypatch):
        torch.testing.assert_close(found.float(), expected.detach(), rtol=2**-8, atol=1e-4)
        for grad, weight in zip(grads, weights, strict=True):
            torch.testing.assert_close(grad, weight.grad, rtol=1e-5, atol=1e-4)


def test_the_deviation_is_that_of_the_whole_batch(monkeypatch):
    x = whole((5, 4, 3)).float()
    alone = deviation(x)
    assert torch.equal(alone, x.std((0, 2, 3), keepdim=True, correction=0))
    for found in in_threads(4, lambda: deviation(mine(x)), monkeypatch):
        torch.testing.assert_close(found, alone)


def test_alone_a_network_is_called_as_it_is():
    network = nn.Sequential(nn.BatchNorm1d(3))
    assert parallel(network) is network
