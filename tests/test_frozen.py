"""Pretrained backbones that stay as they are, or of which the last blocks are trained."""

import json
import sys

import numpy as np
import pytest
import torch
from tiny import join, leave, tiny_store, two_ranks
from torch import nn

from deepcluster import DeepCluster, doctor, frozen, load, metrics, tuning
from deepcluster.__main__ import main
from deepcluster.frozen import PART, Frozen, extract, principal, vectors, width
from deepcluster.settings import Settings
from deepcluster.stages import Plan

NETWORK = """
import torch
from torch import nn

CALLS = []


class Net(nn.Sequential):
    def forward(self, images):
        CALLS.append(len(images))
        return super().forward(images)


def make(channels=3):
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(channels, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU())
    return Net(first, second, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def plain(channels=3):
    return torch.nn.Sequential(*make(channels))  # counting calls fixes the batch of an export


class Log(nn.Module):
    def forward(self, images):
        return torch.log(0.5 - images)  # no number where it is bright


def damaged(channels=3):
    return nn.Sequential(Log(), make(channels))
"""


class Crash(Exception): ...


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A module with a backbone, in the current directory, and a cache of its own."""
    (tmp_path / "tiny_networks.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path / "cache"))
    yield tmp_path
    sys.modules.pop("tiny_networks", None)


def network(channels=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())


def made(channels=1):
    return Frozen(network(channels), 24, width(24))


def coloured(n=120, seed=0):
    """(n, 3, 16, 16) uint8 in four colours, and which."""
    rng = np.random.default_rng(seed)
    colour = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220], [200, 200, 30]])
    which = np.arange(n) % 4
    noise = rng.normal(0, 30, (n, 3, 16, 16))
    return np.clip(colour[which][:, :, None, None] + noise, 0, 255).astype(np.uint8), which


def asked(**more):
    given = {"backbone": "tiny_networks:make", "image_size": 16, "method": "kmeans", "epochs": 3}
    return DeepCluster(4, **{**given, **more})


# --- the module ---


def test_a_frozen_network_stays_as_it_is_in_training():
    model = made()
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.rand(8, 1, 8, 8))
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_vectors_pass_and_images_are_rounded_projected_and_scaled():
    model = made()
    model.map_mean.copy_(torch.arange(24.0))
    model.map_weight.copy_(torch.randn(24, 24, generator=torch.Generator().manual_seed(1)))
    images = torch.rand(5, 1, 8, 8)
    kept = model.network(images).detach().half().float()
    expected = (kept - torch.arange(24.0)) @ model.map_weight.T
    expected = expected / expected.norm(dim=1, keepdim=True) * 24**0.5
    torch.testing.assert_close(model(images), expected)
    assert torch.equal(model(expected), expected)


def test_features_without_a_negative_number_are_replaced_by_their_roots():
    features = np.random.default_rng(0).gamma(1.0, size=(50, 24)).astype(np.float16)
    model = made()
    model.fit(features)
    roots = np.sqrt(features.astype(np.float32))
    expected = (roots - roots.mean(0)) @ model.map_weight.numpy().T
    expected *= 24**0.5 / np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.allclose(model.place(torch.from_numpy(features)).numpy(), expected, atol=1e-4)
    assert model.place(torch.full((1, 24), -1.0)).isfinite().all()
    signed = features - np.float16(1)
    model.fit(signed)
    centred = signed.astype(np.float32) - signed.astype(np.float32).mean(0)
    expected = centred @ model.map_weight.numpy().T
    expected *= 24**0.5 / np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.allclose(model.place(torch.from_numpy(signed)).numpy(), expected, atol=1e-3)


def test_the_map_is_found_where_the_network_is():
    model = made().to("meta")  # a device that is not that of the features, as a GPU is
    model.fit(np.ones((9, 24), np.float16))
    assert model.place(torch.ones(2, 24, device="meta")).device.type == "meta"


def test_a_map_of_before_there_were_roots_has_none():
    model = made()
    model.map_rooted.fill_(True)
    model.load_state_dict({name: x for name, x in made().state_dict().items() if name != "map_rooted"})
    assert not model.map_rooted


def test_principal_directions_are_those_of_numpy_with_a_sign_of_their_own():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6)) * [5, 4, 3, 2, 1, 0.5] + 7
    mean, weight = principal(torch.from_numpy(x).float(), 3)
    directions = np.linalg.svd(x - x.mean(0))[2][:3]
    assert np.allclose(mean.numpy(), x.mean(0), atol=1e-5)
    assert np.allclose(np.abs((weight.numpy() * directions).sum(1)), 1, atol=1e-5)
    assert all(row[np.abs(row).argmax()] > 0 for row in weight.numpy())


def test_principal_directions_without_variance_are_left_out():
    x = torch.zeros(10, 4)
    x[:, 1] = torch.arange(10)
    assert principal(x, 4)[1].shape == (1, 4)


# --- extraction ---


def test_features_are_computed_once_and_are_the_networks_own_rounded(package):
    store, model = tiny_store(PART + 70), made()
    found = extract(model, store, "tiny")
    images = store.data[PART : PART + 64].float() / 255
    assert found.dtype == np.float16
    assert np.array_equal(found[PART : PART + 64], model.embed(images).numpy())
    model.network[0].register_forward_hook(lambda *_: pytest.fail("computed again"))
    assert np.array_equal(extract(model, store, "tiny"), found)


def test_a_killed_extraction_goes_on_where_it_stopped(package, monkeypatch):
    store, model, seen = tiny_store(2 * PART + 10), made(), []
    save = frozen._save

    def killed(file, part):
        save(file, part)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(frozen, "_save", killed)
        with pytest.raises(KeyboardInterrupt):
            extract(model, store, "tiny")
    model.network[0].register_forward_hook(lambda module, given, out: seen.append(len(out)))
    found = extract(model, store, "tiny")
    assert sum(seen) == PART + 10
    assert np.array_equal(found[:64], model.embed(store.data[:64].float() / 255).numpy())
    assert [file.name for file in (doctor.cache_dir() / frozen.key(model, store, "tiny")).iterdir()] == ["features.npy"]


def test_other_images_weights_and_names_have_other_keys():
    store, model = tiny_store(), made()
    keys = {frozen.key(model, store, "tiny"), frozen.key(model, store, "other")}
    keys |= {frozen.key(model, tiny_store(seed=1), "tiny"), frozen.key(model, tiny_store(95), "tiny")}
    with torch.no_grad():
        model.network[1].running_mean += 1
    assert len(keys | {frozen.key(model, store, "tiny")}) == 5


def test_damaged_features_in_the_cache_are_computed_again(package):
    store, model = tiny_store(), made()
    found = np.array(extract(model, store, "tiny"))
    file = doctor.cache_dir() / frozen.key(model, store, "tiny") / "features.npy"
    file.write_bytes(file.read_bytes()[:-10])
    assert np.array_equal(extract(model, store, "tiny"), found)


def test_features_are_computed_in_memory_where_there_is_no_cache(package, monkeypatch):
    (package / "file").write_text("")
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(package / "file" / "cache"))
    store, model = tiny_store(), made()
    assert extract(model, store, "tiny").shape == (96, 24)


def test_features_that_are_too_large_are_refused(package):
    model = made()
    with torch.no_grad():
        model.network[1].weight.fill_(1e7)
    with pytest.raises(ValueError, match="the backbone tiny gives features that are larger than 65504"):
        extract(model, tiny_store(), "tiny")


def _extracts(rank, port, folder):
    join(rank, port)
    store, model = tiny_store(PART + 100), made()
    found = extract(model, store, "tiny")
    model.fit(found)
    leave()
    seen = vectors(model, store, found).data
    torch.save({"found": torch.from_numpy(np.array(found)), "seen": seen}, folder / f"{rank}.pt")


@pytest.mark.ddp
def test_two_processes_share_the_work_and_get_the_same(package):
    store, model = tiny_store(PART + 100), made()
    parts = two_ranks(_extracts, package)
    frozen_alone = extract(model, store, "alone")
    model.fit(frozen_alone)
    for part in parts:
        assert np.array_equal(part["found"].numpy(), frozen_alone)
        torch.testing.assert_close(part["seen"], vectors(model, store, frozen_alone).data)


# --- a run ---


@pytest.mark.parametrize("method", ["kmeans", "temi", "spectral", "sela", "scan"])
def test_predict_of_the_training_images_gives_labels(package, method):
    images, which = coloured()
    model = asked(method=method).fit(images)
    assert model.plan_.frozen
    assert np.array_equal(model.predict(images), model.labels_)
    assert np.array_equal(model.transform(images), model.embedding_)
    if method in ("kmeans", "spectral"):
        assert metrics.accuracy(model.labels_, which) == 1


def test_the_network_sees_every_image_once_and_two_views_of_some(package):
    images, _ = coloured()
    asked().fit(images)
    import tiny_networks

    many = [n for n in tiny_networks.CALLS if n > 2]  # two blank images try the backbone
    assert sum(many) == 3 * len(images)  # their features, and two random views that confidence comes from
    tiny_networks.CALLS.clear()
    asked(method="temi").fit(images)
    assert sum(n for n in tiny_networks.CALLS if n > 2) == 2 * len(images)


def test_a_run_is_whole_and_its_model_needs_no_cache(package):
    images, _ = coloured()
    labels = asked(out="run").fit(images).labels_
    for file in (package / "cache").rglob("features.npy"):
        file.unlink()
    model = load("run")
    assert np.array_equal(model.predict(images), labels)
    assert np.load("run/features.npy").shape == (120, 16)
    config = json.loads((package / "run/config.json").read_text())
    assert config["plan"]["frozen"] is True
    assert config["plan"]["tune_last"] == 0
    model.merge_clusters([[0, 1]])
    assert len(set(model.labels_.tolist())) == 3
    model.undo()
    assert np.array_equal(load("run").labels_, labels)
    again = DeepCluster(**{**model.get_params(), "out": None}).fit(images)
    assert np.array_equal(again.labels_, labels)


@pytest.mark.parametrize("method", ["temi", "sela"])
def test_resuming_is_exact(package, method):
    images, _ = coloured()
    np.save("images.npy", images)
    whole = asked(method=method, out="whole").fit("images.npy")

    def crash(report):
        if report.clock.epoch == 1:
            raise Crash

    stopped = asked(method=method, out="stopped")
    with pytest.raises(Crash):
        stopped.fit("images.npy", hooks=[crash])
    for file in (package / "cache").rglob("features.npy"):
        file.unlink()  # the network in the checkpoint computes them again
    stopped._resume()
    assert np.array_equal(stopped.labels_, whole.labels_)
    assert np.array_equal(stopped.embedding_, whole.embedding_)
    assert np.array_equal(stopped.predict_proba(images), whole.predict_proba(images))


@pytest.mark.parametrize("given", [{}, {"tune_last": 1}, {"frozen": False}])
def test_resuming_on_grey_images_is_exact(package, given):
    """A network that sees grey images as colour is built again so, without what the run started from."""
    images = coloured()[0].mean(1).astype(np.uint8)
    np.save("images.npy", images)
    whole = asked(method="sela", out="whole", **given).fit("images.npy")
    assert len(whole.classifier_.state_dict()["backbone." + "network." * (not given) + "0.mean"]) == 3

    def crash(report):
        if report.clock.epoch == 1:
            raise Crash

    stopped = asked(method="sela", out="stopped", **given)
    with pytest.raises(Crash):
        stopped.fit("images.npy", hooks=[crash])
    stopped._resume()
    for name, value in whole.classifier_.state_dict().items():
        assert torch.equal(value, stopped.classifier_.state_dict()[name]), name
    assert np.array_equal(stopped.labels_, whole.labels_)
    assert np.array_equal(stopped.embedding_, whole.embedding_)


@pytest.mark.parametrize("grey", [False, True])
def test_a_run_may_start_from_a_frozen_one(package, grey):
    images, _ = coloured()
    first = asked(out="first").fit(images)
    other = images.mean(1).astype(np.uint8) if grey else images
    again = DeepCluster(4, init_from="first", method="kmeans", epochs=3, image_size="auto").fit(other)
    assert (again.plan_.frozen, again.plan_.backbone, again.plan_.shape[-1]) == (True, "tiny_networks:make", 16)
    own, old = (dict(one.classifier_.backbone.network.state_dict()) for one in (again, first))
    assert own.keys() == old.keys()
    assert all(torch.equal(own[name], old[name]) for name in own), "what it came with, its normalisation too"
    if not grey:
        assert np.array_equal(again.embedding_, first.embedding_)
    with pytest.raises(ValueError, match="first holds tiny_networks:make for 3x16x16 images, this run needs convnet"):
        DeepCluster(4, init_from="first", backbone="convnet").fit(images)


def test_what_a_pretrained_network_saw_is_the_size_of_the_next_run(package):
    images, _ = coloured(40)
    asked(image_size=12, out="first").fit(images)
    assert DeepCluster(4, init_from="first", method="kmeans", epochs=1).fit(images).plan_.shape == (3, 12, 12)


def test_the_backbone_of_any_run_can_be_kept(package):
    """--init-from of a run that was trained, frozen if asked for, and always by the command cluster."""
    images, _ = coloured()
    np.save("images.npy", images)
    first = DeepCluster(4, method="sela", backbone="convnet", epochs=1, out="first").fit(images)
    again = DeepCluster(4, init_from="first", frozen=True, method="kmeans", epochs=2).fit(images)
    learnt = dict(first.classifier_.backbone.state_dict())
    own = again.classifier_.backbone.network.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in learnt.items())
    command = ["cluster", "images.npy", "--init-from", "first", "--n-clusters", "4", "--epochs", "1", "--quiet"]
    assert main([*command, "--out", "run"]) == 0
    assert load("run").plan_.frozen
    assert main([*command, "--method", "sela", "--no-frozen", "--out", "trained"]) == 0
    assert not load("trained").plan_.frozen


def _clusters(rank, port, folder):
    join(rank, port)
    found = {}
    for method in ("kmeans", "temi"):
        model = asked(method=method).fit(coloured()[0])
        found[method] = torch.from_numpy(model.labels_)
    leave()
    torch.save(found, folder / f"{rank}.pt")


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_give_the_clusters_of_one(package):
    alone = {method: asked(method=method).fit(coloured()[0]).labels_ for method in ("kmeans", "temi")}
    for found in two_ranks(_clusters, package):
        assert {method: labels.tolist() for method, labels in found.items()} == {
            method: labels.tolist() for method, labels in alone.items()
        }


def test_a_frozen_model_goes_through_onnx(package):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from deepcluster.export import export

    images, _ = coloured(40)
    model = asked(backbone="tiny_networks:plain", out="run").fit(images)
    export(package / "run", "onnx", package / "model.onnx")
    session = runtime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    features, _, cluster = session.run(None, {"images": images.astype(np.float32) / 255})
    assert np.array_equal(cluster, model.labels_)
    np.testing.assert_allclose(features, model.embedding_, atol=2e-3)


def test_features_with_nan_are_one_clear_line(package):
    images, _ = coloured()
    with pytest.raises(
        ValueError, match=r"tiny_networks:damaged gives features that are NaN for 120 of 120 images, e\.g"
    ):
        asked(backbone="tiny_networks:damaged").fit(images)


# --- what is trained ---


def test_the_last_blocks_are_trained_and_no_others(package):
    images, _ = coloured()
    model = asked(method="sela", tune_last=1).fit(images)
    plain = asked(method="sela", frozen=False).fit(images)
    import tiny_networks

    first = tiny_networks.make().state_dict()
    for fitted, fixed in ((model, True), (plain, False)):
        own = fitted.classifier_.backbone[1]
        own = getattr(own, "net", own).state_dict()
        same = {name: torch.equal(own[name], value) for name, value in first.items()}
        assert same["0.0.weight"] == same["0.1.running_mean"] == fixed
        assert not same["1.0.weight"]
        assert not same["1.1.running_mean"]
    assert (model.plan_.frozen, model.plan_.tune_last) == (False, 1)
    assert np.array_equal(model.predict(images), model.labels_)


def test_a_residual_network_has_a_block_each():
    from torchvision.models import resnet18

    backbone = nn.Sequential(nn.Identity(), resnet18(weights=None))
    own = tuning.tuned(backbone, 2).train()
    trained = {name.split(".")[1] + "." + name.split(".")[2] for name, p in own.named_parameters() if p.requires_grad}
    assert {name[:8] for name in trained} == {"layer4.1", "fc.weigh", "fc.bias"}
    assert not own[1].layer4[0].training
    assert own[1].layer4[1].training
    with pytest.raises(ValueError, match="--tune-last 99: the backbone has 10 blocks; give at most so many"):
        tuning.tuned(backbone, 99)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"backbone": "efficientnet-lite0"}, True),
        ({"backbone": "resnet18", "weights": "w.pth"}, True),
        ({"backbone": "resnet18"}, False),
        ({"backbone": "resnet18", "init_from": "run"}, False),
        ({"backbone": "resnet18", "init_from": "run", "asked": True}, True),
        ({"backbone": "resnet18", "weights": "w.pth", "asked": False}, False),
        ({"backbone": "resnet18", "weights": "w.pth", "tune_last": 1}, False),
    ],
)
def test_who_is_frozen(given, expected):
    usual = {"asked": "auto", "tune_last": 0, "weights": None, "init_from": None, "shape": (3, 32, 32)}
    assert tuning.frozen(**{**usual, **given}) is expected


def test_nothing_to_keep_is_refused():
    with pytest.raises(
        ValueError, match="--frozen keeps what a backbone has learnt, and resnet18 has learnt nothing yet"
    ):
        tuning.frozen(True, 0, "resnet18", None, None, (3, 32, 32))
    with pytest.raises(ValueError, match="--tune-last 2 is for images; the source holds vectors"):
        tuning.frozen("auto", 2, "mlp", "w.pth", None, (32,))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"frozen": "yes"}, "frozen must be true, false or auto; got 'yes'"),
        ({"tune_last": -1}, "tune_last must be a whole number of at least 0; got -1"),
        ({"frozen": True, "tune_last": 1}, "give one of them"),
    ],
)
def test_settings_that_make_no_sense(given, says):
    with pytest.raises(ValueError, match=says):
        Settings(**given)


def test_plans_from_before_load():
    old = {"stages": [], "n_clusters": 3, "backbone": "convnet", "weights": None, "init_from": None,
           "shape": [1, 8, 8], "seed": 0, "bf16": False}  # fmt: skip
    plan = Plan.from_dict(old)
    assert (plan.frozen, plan.tune_last) == (False, 0)


def test_k_of_images_sees_what_a_frozen_run_sees(package, capsys):
    """Evidence for the images themselves is that of a run of them with the same network."""
    np.save("images.npy", coloured(160)[0])
    net = ["--backbone", "tiny_networks:make", "--quiet"]
    assert (
        main(["fit", "images.npy", *net, "--method", "kmeans", "--n-clusters", "4", "--epochs", "1", "--out", "run"])
        == 0
    )
    capsys.readouterr()
    said = []
    for what in (["run"], ["images.npy", *net[:2]]):
        assert main(["k", *what, "--json", "--max", "8", "--quiet"]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0]["answers"] == said[1]["answers"] == [4]
    assert [row["gain"] for row in said[0]["rows"]] == pytest.approx([row["gain"] for row in said[1]["rows"]], abs=0.05)
