"""Which backbone fits, without labels: the scores, what is at hand, what is said."""

import math
import shutil
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deepcluster import advise, pretrained, trust
from deepcluster.__main__ import main
from deepcluster.advise import Candidate, Score, at_hand, sample, verdict
from deepcluster.sources import open_source


def blobs(n=200, k=10, d=16, spread=0.1, seed=0):
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(k, d, generator=rng)
    return centres[torch.arange(n) % k] + spread * torch.randn(n, d, generator=rng)


def noise(x, size, seed=1):
    return x + size * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


# --- the score ---


def test_a_view_that_changes_nothing_keeps_all_neighbours():
    x = blobs()
    assert advise.score(x, x, 8).kept == 1
    assert advise.score(x, 3 * (x - x.mean(0)) + x.mean(0), 8).kept == 1  # length tells nothing


def test_a_view_of_something_else_keeps_what_chance_keeps():
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    y = torch.randn(400, 16, generator=torch.Generator().manual_seed(1))
    assert advise.score(x, y, 8).kept == pytest.approx(advise.NEAR / 399, abs=0.02)


def test_kept_neighbours_are_counted_as_by_a_naive_loop():
    x = blobs(60, 5)
    v = noise(x, 0.3)
    mean = x.mean(0)
    a, b = F.normalize(x - mean, dim=1), F.normalize(v - mean, dim=1)
    shares = []
    for i in range(60):
        others = [j for j in range(60) if j != i]
        near = [sorted(others, key=lambda j: -float(own[i] @ a[j]))[: advise.NEAR] for own in (a, b)]
        shares.append(len(set(near[0]) & set(near[1])) / advise.NEAR)
    assert advise.score(x, v, 8).kept == pytest.approx(np.mean(shares), abs=1e-6)


def test_images_are_found_again_as_by_a_naive_loop():
    x = blobs(60, 5)
    v = noise(x, 0.2)
    mean = x.mean(0)
    a, b = F.normalize(x - mean, dim=1), F.normalize(v - mean, dim=1)
    hits = [max(range(60), key=lambda j: float(b[i] @ a[j])) == i for i in range(60)]
    assert 0.1 < np.mean(hits) < 0.9
    assert advise.score(x, v, 8).found == pytest.approx(np.mean(hits))
    assert advise.score(x, x, 8).found == 1


def test_features_that_have_collapsed_find_nothing():
    assert advise.score(torch.ones(60, 4), torch.ones(60, 4), 8).found == 0


def test_what_all_images_share_is_taken_away():
    x = blobs()
    v = noise(x, 0.5)
    plain, shifted = advise.score(x, v, 8), advise.score(x + 50, v + 50, 8)
    assert shifted.kept == pytest.approx(plain.kept, abs=0.02)
    assert shifted.stable == pytest.approx(plain.stable, abs=0.1)


def test_clusters_that_are_there_are_found_in_both_halves():
    assert advise.score(blobs(), blobs(), 8).stable > 0.95
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    assert advise.score(x, x, 8).stable < 0.3


def test_rank_counts_directions():
    x = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0))
    assert advise.score(x, x, 8).rank == pytest.approx(6, rel=0.01)
    flat = torch.cat([x[:, :2], torch.zeros(4000, 4)], 1)
    assert advise.score(flat, flat, 8).rank == pytest.approx(2, rel=0.01)
    two = x[:, :2] * torch.tensor([1.0, math.sqrt(3)])  # variances 1/4 and 3/4
    expected = math.exp(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert advise.score(two, two, 8).rank == pytest.approx(expected, rel=0.01)


def test_features_that_are_no_numbers_or_too_few_are_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        advise.score(blobs() * math.nan, blobs(), 8)
    with pytest.raises(ValueError, match="at least 40 images; got 39"):
        advise.score(blobs(39), blobs(39), 8)


# --- what is at hand ---


def test_weights_are_found_by_their_names(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("DEEPCLUSTER_WEIGHTS", str(tmp_path / "mine"))
    (tmp_path / "home/hub/checkpoints").mkdir(parents=True)
    (tmp_path / "mine/a").mkdir(parents=True)
    cached = tmp_path / "hf/models--timm--net.tag/snapshots/123"
    cached.mkdir(parents=True)
    first = tmp_path / "home/hub/checkpoints/resnet18-f37072fd.pth"
    second = tmp_path / "mine/a/mobilenet_v3_small-047dcff4.pth"
    for file in (first, second, tmp_path / "mine/unknown.pth", cached / "model.safetensors"):
        file.touch()
    (cached / "config.json").write_text('{"architecture": "resnet18"}')
    found = {c for c in at_hand() if c.backbone != "efficientnet-lite0"}
    expected = {Candidate("torchvision:resnet18", str(first)), Candidate("torchvision:mobilenet_v3_small", str(second))}
    timms = {Candidate(str(cached / "model.safetensors"))} if find_spec("timm") else set()  # it is asked about these
    assert found == expected | timms


def test_the_sample_is_spread_evenly_and_knows_no_labels():
    source = open_source("digits")
    some = sample(source, 5)
    rows = [0, 449, 898, 1347, 1796]
    assert some.names == [source.names[row] for row in rows]
    assert all(np.array_equal(some.read(i), source.read(row)) for i, row in enumerate(rows))
    assert some.classes is None
    assert len({some.signature, source.signature, sample(source, 6).signature}) == 3
    assert len(sample(source, 5000).names) == len(source.names)


# --- what is said ---

BASE = Candidate("convnet")
NET = Candidate("torchvision:resnet18", "r.pth")


def of(kept):
    return Score(kept, 0.9 - kept, 0.5, 20.0, 32, 512)


@pytest.mark.parametrize(
    ("kept", "line", "command"),
    [
        (0.5, "use torchvision:resnet18=r.pth, frozen: 50% of the images are found again by a crop, 20% where",
         "cluster photos --backbone torchvision:resnet18 --weights r.pth"),
        (0.22, "use torchvision:resnet18=r.pth, retrained: ",
         "fit photos --backbone torchvision:resnet18 --weights r.pth --no-frozen"),
        (0.1, "train convnet from scratch", "fit photos --backbone convnet"),
    ],
)  # fmt: skip
def test_the_verdict_has_a_reason_and_a_command(kept, line, command):
    why, told = verdict({BASE: of(0.2), NET: of(kept)}, "photos")
    assert why.startswith(line)
    assert told == f"    deepcluster {command} --out RUN"


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """No weights on this machine but those of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(advise, "at_hand", lambda: iter(()))
    monkeypatch.setattr(advise, "UNTRAINED", ("convnet",))
    monkeypatch.setattr(trust, "_given", set())
    monkeypatch.delitem(sys.modules, "advisednets", raising=False)
    pretrained._facts_of_code.cache_clear()
    (tmp_path / "advisednets.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Broken(nn.Module):\n    def forward(self, x):\n        return x.mean((2, 3)) * float('nan')\n"
        "def colour():\n    net = nn.AdaptiveAvgPool2d(2)\n    net.input_size = 16\n"
        "    return nn.Sequential(net, nn.Flatten())\n"
        "def broken():\n    net = Broken()\n    net.input_size = 16\n    return net\n"
    )
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 255, (60, 1, 1, 3))
    np.save("x.npy", np.clip(colours + rng.integers(-20, 20, (60, 16, 16, 3)), 0, 255).astype(np.uint8))
    return tmp_path


def test_the_command_orders_and_says_what_to_do(alone, capsys):
    asked = ["--backbone", "advisednets:colour", "--backbone", "advisednets:broken"]
    assert main(["advise", "x.npy", *asked, "--n", "50", "--quiet"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["backbone", "px", "D", "found", "kept", "stable", "rank"]
    rows = {line.split()[0]: line.split() for line in said[1:3]}
    assert set(rows) == {"advisednets:colour", "convnet"}
    assert rows["advisednets:colour"][2] == "12"
    found = [float(line.split()[-4]) for line in said[1:3]]
    assert found == sorted(found, reverse=True)
    assert "advisednets:broken: left out: it gives features that are NaN or infinite" in said
    assert any(line.startswith("50 images, no labels") for line in said)
    assert said[-1].startswith("    deepcluster fit x.npy --backbone ")
    assert not (alone / "run").exists()


def test_the_same_images_give_the_same_table(alone):
    assert advise.advise("x.npy", n=50) == advise.advise("x.npy", n=50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.npy", "--backbone", "nonet"], "unknown backbone 'nonet'"),
        (["x.npy", "--backbone", "torchvision:resnet18=none.pth"], "no weight file none.pth; get https://"),
        (["x.npy", "--n", "39"], "--n must be at least 40; got 39"),
        (["table.npy"], "holds features, which need no backbone; advise is for images"),
    ],
)
def test_what_cannot_be_judged_is_refused_in_one_line(alone, capsys, arguments, message):
    np.save("table.npy", np.zeros((50, 7), np.float32))
    assert main(["advise", *arguments, "--quiet"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_few_images_are_too_few(alone, capsys):
    shutil.copy("x.npy", "y.npy")
    np.save("y.npy", np.load("x.npy")[:30])
    assert main(["advise", "y.npy", "--quiet"]) == 2
    assert "advise needs at least 40 images; got 30" in capsys.readouterr().err
