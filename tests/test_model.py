"""Networks and heads: shapes, gradients, and what is refused."""

import os
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from deepcluster.backbones import BACKBONES, Normalise, Sobel, alexnet, convnet, load_weights, make_backbone
from deepcluster.model import HEADS, Model, Projector, Prototypes, Standardised


def images(n=4, channels=1, size=16, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- heads ---


@pytest.mark.parametrize("name", sorted(HEADS))
def test_every_head_scores_views_of_a_batch(name):
    torch.manual_seed(0)
    head = HEADS[name](6, 5)
    x = features(2, 8, 6).requires_grad_()
    scores = head(x)
    assert scores.shape == (2, 8, 5)
    assert head.out_features == 5
    scores.square().mul(features(2, 8, 5, seed=1)).sum().backward()
    assert x.grad.abs().max() > 0
    for key, p in head.named_parameters():
        if p.requires_grad:  # centroids are set, not trained
            assert p.grad is not None, key
            assert p.grad.abs().max() > 0, key
    head.eval()
    torch.testing.assert_close(head(x)[1], head(x[1]))  # views do not mix in eval mode


def test_standardised_scores_have_no_favourite():
    torch.manual_seed(0)
    scores = Standardised(6, 5)(features(2, 50, 6) * 7 + 3).flatten(0, 1)
    torch.testing.assert_close(scores.mean(0), torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.std(0, correction=0), torch.ones(5), atol=1e-3, rtol=0)


def test_prototypes_give_cosines():
    head, x = Prototypes(6, 5), features(4, 6) * 10
    naive = [[F.cosine_similarity(a, b, dim=0).item() for b in head.weight] for a in x]
    torch.testing.assert_close(head(x), torch.tensor(naive), atol=1e-6, rtol=0)


def test_projections_are_unit_vectors_in_float32():
    head = Projector(32, 5)
    with torch.autocast("cpu", torch.bfloat16):
        out = head(features(2, 8, 32))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(2, 8))


# --- the model ---


class Watched(nn.Module):
    """Means of the pixels of each quarter; remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(tuple(x.shape))
        return F.adaptive_avg_pool2d(x, 2).flatten(1)


def test_views_of_one_size_go_through_together_and_come_back_in_order():
    model = Model(Watched(), 4, (3, 6), nn.Linear)
    views = [images(5, size=s, seed=i) for i, s in enumerate((8, 4, 8, 6, 4))]
    logits = model(views)
    assert model.backbone.seen == [(10, 1, 8, 8), (10, 1, 4, 4), (5, 1, 6, 6)]
    assert [z.shape for z in logits] == [(5, 5, 3), (5, 5, 6)]
    for v, view in enumerate(views):
        torch.testing.assert_close(logits[1][v], model.heads[1](model.embed(view)))


def test_every_head_sees_the_same_features():
    model = Model(Watched(), 4, (3, 3), nn.Linear)
    first, second = model([images(5)])
    assert not torch.equal(first, second)
    assert model.head_list()[1] is model.heads[1]
    assert [head.out_features for head in model.head_list()] == [3, 3]


# --- backbones ---


def test_sobel_of_a_step():
    step = torch.tensor([0.0, 0, 1, 1, 1]).repeat(1, 1, 5, 1)
    edges = Sobel()(step)
    assert edges.shape == (1, 2, 5, 5)
    assert edges[0, 0, 2].tolist() == [0, -4, -4, 0, 4]  # beyond the edge there is black
    assert edges[0, 1, 2].tolist() == [0] * 5
    turned = Sobel()(step.mT)
    assert turned[0, 1, :, 2].tolist() == [0, -4, -4, 0, 4]


def test_sobel_sees_no_colour_and_has_nothing_to_learn():
    grey = images(2, 1)
    torch.testing.assert_close(Sobel()(grey.repeat(1, 3, 1, 1)), Sobel()(grey))
    assert not list(Sobel().parameters())
    assert not Sobel().state_dict()


SIZES = {
    "convnet": 8,
    "resnet18": 16,
    "resnet34": 16,
    "resnet50": 16,
    "vgg16": 32,
    "alexnet": 64,
    "mlp": 0,
    "identity": 0,
}
DIMS = {"resnet18": 512, "resnet34": 512, "resnet50": 2048, "vgg16": 4096, "alexnet": 4096, "mlp": 256, "identity": 8}
HEAVY = ("vgg16", "alexnet")


def check(net, dim, x, expected):
    out = net(x)
    assert out.shape == (len(x), dim)
    assert dim == expected
    assert out.isfinite().all()
    if any(True for _ in net.parameters()):
        out.square().sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, f"no gradient for {name}"
        assert p.grad.isfinite().all(), name
        if p.ndim > 1:
            assert p.grad.abs().max() > 0, f"zero gradient for {name}"
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(net(x[:1]), net(x)[:1], atol=1e-3, rtol=1e-3)  # images do not mix


def test_every_backbone_is_in_the_table_of_tests():
    assert set(BACKBONES) == set(SIZES)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in HEAVY)) for n in sorted(BACKBONES)])
def test_every_backbone_makes_features_and_trains(name, channels):
    torch.manual_seed(0)
    shape = (channels, SIZES[name], SIZES[name]) if SIZES[name] else (7,)
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    net, dim = make_backbone(name, shape)
    assert isinstance(net[0], Normalise)
    check(net, dim, x, DIMS.get(name, dim))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dim"), [("mobilenet_v3_small", 1024), ("efficientnet_b0", 1280), ("shufflenet_v2_x0_5", 1024)]
)
def test_networks_of_torchvision(name, dim):
    torch.manual_seed(0)
    net, found = make_backbone(f"torchvision:{name}", (1, 32, 32))
    check(net, found, images(3, 1, 32), dim)


@pytest.mark.parametrize("size", [2, 3, 4, 8, 9, 16, 28, 96])
def test_convnet_takes_images_of_any_size_and_says_how_many_features_it_makes(size):
    net, dim = convnet(1, size)
    assert net.eval()(images(2, 1, size)).shape == (2, dim)
    smallest = min(out.shape[-1] for out in maps(net, images(2, 1, size)))
    assert smallest >= min(size, 2)


def maps(net, x):
    """The map behind every convolution and pooling."""
    for layer in net:
        x = layer(x)
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d):
            yield x


def test_resnets_look_closely_at_small_images_only():
    small, _ = make_backbone("resnet18", (1, 32, 32))
    large, _ = make_backbone("resnet18", (1, 64, 64))
    assert small[1].conv1.stride == (1, 1)
    assert isinstance(small[1].maxpool, nn.Identity)
    assert large[1].conv1.stride == (2, 2)
    assert large[1].conv1.in_channels == 1


def test_images_are_normalised_by_channel_and_the_numbers_travel_with_the_model():
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.25, 1])
    net, _ = make_backbone("convnet", (3, 8, 8), mean, std)
    x = images(2, 3, 8)
    expected = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    torch.testing.assert_close(net[0](x), expected)
    assert {"0.mean", "0.std"} <= set(net.state_dict())
    default, _ = make_backbone("mlp", (4,))
    torch.testing.assert_close(default[0](torch.full((2, 4), 0.75)), torch.ones(2, 4))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("convent", (1, 8, 8), "unknown backbone 'convent'; did you mean 'convnet'"),
        ("zzz", (1, 8, 8), "unknown backbone 'zzz'; choose from alexnet, convnet, .*timm:NAME, torchvision:NAME"),
        ("torchvision:resnet19", (1, 32, 32), "torchvision has no model 'resnet19'; did you mean 'resnet1"),
        ("torchvision:squeezenet1_0", (1, 64, 64), "squeezenet1_0 does not end in a linear layer"),
        ("keras:resnet18", (1, 32, 32), "unknown backbone 'keras:resnet18'"),
        ("alexnet", (3, 32, 32), "alexnet needs images of at least 64 px, got 32; use --image-size or convnet"),
        ("vgg16", (3, 16, 16), "vgg16 needs images of at least 32 px, got 16"),
        ("mlp", (1, 8, 8), r"mlp takes vectors; the data has shape \(1, 8, 8\)"),
        ("convnet", (7,), r"convnet takes images; the data has shape \(7,\)"),
        ("torchvision:resnet18", (7,), r"torchvision:resnet18 takes images; the data has shape \(7,\)"),
    ],
)
def test_a_backbone_that_cannot_be_is_refused(name, shape, message):
    with pytest.raises(ValueError, match=message):
        make_backbone(name, shape)


def test_timm_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm is not installed; pip install 'deepcluster\[timm\]'"):
        make_backbone("timm:resnet18", (3, 32, 32))


def test_alexnet_is_the_one_of_the_paper():
    net, _ = alexnet(3, 64)
    convolutions = [(m.in_channels, m.out_channels) for m in net if isinstance(m, nn.Conv2d)]
    assert convolutions == [(2, 96), (96, 256), (256, 384), (384, 384), (384, 256)]
    assert isinstance(net[-1], nn.Linear)  # features are taken before the last ReLU


# --- weights ---


@pytest.fixture
def trained():
    torch.manual_seed(1)
    net, _ = make_backbone("convnet", (1, 8, 8))
    net(images(4, 1, 8))  # moves the running means
    return net


def untrained(channels=1):
    torch.manual_seed(2)
    return make_backbone("convnet", (channels, 8, 8))[0]


def save(state, path):
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.safetensors"])
def test_weights_come_back_from_a_file(trained, tmp_path, name):
    extra = {"fc.weight": torch.zeros(10, 256), "fc.bias": torch.zeros(10)}  # a classifier, which we have no use for
    save(trained[1].state_dict() | extra, tmp_path / name)
    other = untrained()
    load_weights(other, str(tmp_path / name))
    for a, b in zip(trained.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_weights_may_be_wrapped_in_a_training_checkpoint(trained, tmp_path):
    torch.save({"epoch": 3, "state_dict": trained[1].state_dict()}, tmp_path / "w.pth")
    other = untrained()
    load_weights(other, tmp_path / "w.pth")
    assert torch.equal(other[1][0].weight, trained[1][0].weight)


def test_weights_older_than_counters_of_batches_fit(trained, tmp_path):
    old = {k: v for k, v in trained[1].state_dict().items() if not k.endswith("num_batches_tracked")}
    save(old, tmp_path / "w.safetensors")
    other = untrained()
    load_weights(other, tmp_path / "w.safetensors")
    means = [{k: v for k, v in net[1].state_dict().items() if k.endswith("running_mean")} for net in (other, trained)]
    assert means[0]
    assert all(torch.equal(means[0][k], means[1][k]) for k in means[1])


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_weights_that_do_not_fit_are_refused_by_name_and_nothing_is_changed(trained, tmp_path, name):
    save(trained[1].state_dict(), tmp_path / name)
    other = untrained(channels=3)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{name} does not fit this backbone: 1 of \d+ tensors, e.g. 0.weight"):
        load_weights(other, tmp_path / name)
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"damaged", b"\x08\x00\x00\x00\x00\x00\x00\x00{}}"])
def test_damaged_weights_are_refused_in_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="cannot read weights from") as caught:
        load_weights(untrained(), tmp_path / name)
    assert "\n" not in str(caught.value)


class Malice:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


def test_code_in_a_weight_file_is_never_executed(trained, tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "w.pth"
    torch.save(trained[1].state_dict() | {"fc.weight": Malice(victim)}, path)
    with pytest.raises(ValueError, match="cannot read weights from"):
        load_weights(untrained(), path)
    assert not victim.exists()


def test_a_missing_weight_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no weight file .*none.pth; give a .safetensors or .pth file"):
        load_weights(untrained(), tmp_path / "none.pth")
