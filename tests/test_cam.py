"""Heat-maps: Grad-CAM by hand, where something is there to see, for edited, sure and flat classifiers too."""

import pytest
import torch
import torch.nn.functional as F
from report_run import classifier_of
from tiny import noise
from torch import nn

from deepcluster.cam import heat
from deepcluster.classifier import Classifier, Spec
from deepcluster.edits import Merge, Step


def by_hand(classifier, images, cluster, weights=None):
    """The textbook on a convnet: the ReLU before the pooling, the slope of the log share of standardised scores."""
    net = classifier.backbone[1]
    with torch.no_grad():
        maps = net[:-2](classifier.backbone[0](images.float() / 255))
    maps = maps.requires_grad_()
    z = classifier.head(net[-2:](maps))
    p = (z / z.detach().std(1, correction=0, keepdim=True)).softmax(1)[:, classifier.order]
    p = p @ (torch.eye(p.shape[1]) if weights is None else weights)
    slope = torch.autograd.grad(p.gather(1, cluster[:, None]).log().sum(), maps)[0]
    found = torch.stack([sum(s.mean() * m for s, m in zip(*one, strict=True)) for one in zip(slope, maps, strict=True)])
    found = F.interpolate(found.detach().clamp_min(0)[:, None], size=images.shape[2:], mode="bilinear")[:, 0]
    return torch.stack([one / one.max() if one.max() > 0 else one for one in found])


@pytest.fixture
def classifier():
    made = classifier_of(4, (3, 16, 16))
    made.order.copy_(torch.tensor([2, 0, 3, 1]))
    return made


def test_it_is_grad_cam(classifier):
    images, cluster = noise(8, 3, 16), torch.arange(8) % 4
    found = heat(classifier, images, cluster)
    assert found.shape == (8, 16, 16)
    assert found.dtype == torch.float32
    assert found.min() == 0
    assert torch.allclose(found, by_hand(classifier, images, cluster), atol=1e-5)
    assert (found.amax((1, 2)) > 0.99).sum() >= 6
    assert not torch.allclose(found, heat(classifier, images, (cluster + 1) % 4), atol=0.1)


def test_edits_are_obeyed(classifier):
    images, features = noise(8, 3, 16), torch.rand(8, 512).numpy()
    classifier.edit(features, Step((Merge((1, 3)),)))
    together = torch.eye(4)
    together[3, 1] = 1
    found = heat(classifier, images, torch.ones(8, dtype=torch.int64))
    assert torch.allclose(found, by_hand(classifier, images, torch.ones(8, dtype=torch.int64), together), atol=1e-5)


def test_a_sure_classifier_has_heat_too(classifier):
    images, cluster = noise(6, 3, 16), torch.arange(6) % 4
    expected = heat(classifier, images, cluster)
    with torch.no_grad():
        classifier.head.weight *= 1e6
        classifier.head.bias *= 1e6
    assert classifier(images / 255)[1].max(1).values.min() == 1
    assert torch.allclose(heat(classifier, images, cluster), expected, atol=1e-4)


def test_it_finds_the_bright_spot():
    conv = nn.Conv2d(1, 2, 3, padding=1, bias=False)  # two maps: bright, dark
    conv.weight.data = torch.tensor([1.0, -1.0])[:, None, None, None] * torch.ones(2, 1, 3, 3) / 9
    backbone = nn.Sequential(conv, nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = nn.Linear(2, 2, bias=False)
    head.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    seeing = Classifier(Spec("convnet", (1, 20, 20), "Linear", 2, "0"), backbone, head, 2)
    images = torch.zeros(2, 1, 20, 20, dtype=torch.uint8)
    images[0, 0, 2:7, 12:17] = 255
    images[1, 0, 14:19, 3:8] = 255
    found = heat(seeing, images, torch.zeros(2, dtype=torch.int64))
    peaks = [divmod(int(one.argmax()), 20) for one in found]
    assert (3 <= peaks[0][0] <= 5, 13 <= peaks[0][1] <= 15) == (True, True)
    assert (15 <= peaks[1][0] <= 17, 4 <= peaks[1][1] <= 6) == (True, True)
    assert found[0, 10:].max() == found[1, :10].max() == 0
    assert heat(seeing, images, torch.ones(2, dtype=torch.int64)).max() == 0  # nothing speaks for dark


def test_one_cluster_has_no_heat_but_no_error():
    assert heat(classifier_of(1), noise(3, 3, 8), torch.zeros(3, dtype=torch.int64)).max() == 0


def test_a_frozen_classifier_has_heat_and_nothing_is_left_behind(classifier):
    images, cluster = noise(4, 3, 16), torch.arange(4)
    expected = heat(classifier, images, cluster)
    assert all(parameter.grad is None for parameter in classifier.parameters())
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    classifier.requires_grad_(False).train()
    with torch.no_grad():
        assert torch.equal(heat(classifier, images, cluster), expected)
    assert all(torch.equal(before[name], value) for name, value in classifier.state_dict().items())
    assert not any(module._forward_hooks for module in classifier.modules())


@pytest.mark.parametrize("name", ["resnet18", "vgg16", "alexnet", "torchvision:convnext_tiny", "torchvision:vit_b_16"])
@pytest.mark.slow
def test_networks_of_every_kind_have_heat(name):
    from deepcluster.backbones import make_backbone

    shape = (3, 224, 224) if "vit" in name else (3, 64, 64)
    torch.manual_seed(0)
    backbone, dim = make_backbone(name, shape)
    made = Classifier(Spec(name, shape, "Linear", 3, "0"), backbone, nn.Linear(dim, 3), dim)
    found = heat(made, noise(1, 3, shape[1]).expand(3, -1, -1, -1), torch.arange(3))
    assert found.shape == (3, *shape[1:])
    assert found.max() == 1  # of some cluster: noise may speak against another one everywhere


def test_vectors_are_refused(classifier):
    with pytest.raises(ValueError, match=r"got \(4, 5\)"):
        heat(classifier, torch.rand(4, 5), torch.zeros(4, dtype=torch.int64))
    flat = Classifier(Spec("convnet", (3, 8, 8), "Linear", 2, "0"), nn.Flatten(), nn.Linear(192, 2), 192)
    with pytest.raises(ValueError, match="no maps"):
        heat(flat, noise(2, 3, 8), torch.zeros(2, dtype=torch.int64))
