"""What the fuzz tests found, one case each, so that it stays found."""

from pathlib import Path

import numpy as np
import pytest
import torch
from finished import finished
from fuzzing import command
from fuzzing_files import encoded
from PIL import Image
from safetensors.torch import load, save
from tiny import make_model, tiny_store

from deepcluster import checkpoint, decode, landscape, outputs
from deepcluster.recipe import make_recipe
from deepcluster.settings import Settings
from deepcluster.sources import open_source
from deepcluster.store import open_store, probe
from deepcluster.trainer import Training, start

HUGE = 10**400  # larger than any float


@pytest.mark.parametrize(
    "asked", [{"lr": HUGE}, {"epochs": HUGE}, {"overcluster": HUGE}, {"image_size": 10**9}], ids=str
)
def test_numbers_that_no_float_can_hold_or_no_memory(asked):
    with pytest.raises(ValueError, match="must be"):
        Settings(**asked)


@pytest.mark.parametrize(
    ("name", "key"), [("swav", "crops"), ("scan", "n_heads"), ("sela", "label_views"), ("iic", "overcluster")]
)
def test_a_parameter_that_is_counted_out_has_a_limit(name, key):
    with pytest.raises(ValueError, match=f"{key} must be at least 1 and at most 1000000"):
        make_recipe(name, **{key: 10**12})


def test_a_weight_that_is_no_float():
    with pytest.raises(ValueError, match="entropy_weight must be at least 0"):
        make_recipe("scan", entropy_weight=HUGE)


def test_json_nested_deeper_than_python_reads(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    np.save("one.npy", np.zeros((1, 5)))
    Path("c.json").write_text("[" * 100_000)
    assert command(["fit", "one.npy", "--out", "new", "--config", "c.json"], capfd) == 2
    assert command(["fit", "one.npy", "--out", "new", "--set", "x=" + "[" * 100_000], capfd) == 2


def test_seeds_up_to_the_largest_that_a_run_can_write_down(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.random.default_rng(0).normal(size=(24, 5)))
    argv = ["fit", "x.npy", "--out", "run", "--method", "uic", "--n-clusters", "2", "--epochs", "1", "--quiet"]
    assert command([*argv, "--seed", str(2**63)], capfd) == 2  # said before anything is trained
    assert command([*argv, "--seed", str(2**63 - 1), "--dry-run"], capfd) == 0
    assert command([*argv, "--seed", str(2**63 - 1)], capfd) == 0


def test_libtiff_is_silent(capfd):
    data = bytearray(encoded("tiff", "L", compression="tiff_lzw"))
    entry = data.index(b"\x1c\x01\x03\0")  # PlanarConfiguration
    data[entry + 8] = 56
    with pytest.raises(decode.BadImage):
        decode.decode(bytes(data), 8, 1)
    assert capfd.readouterr().err == ""


def test_names_with_lines_in_them_make_no_more_lines(tmp_path):
    (tmp_path / "new\nline.png").write_bytes(b"no image")
    source = open_source(str(tmp_path))
    for look in (probe, lambda source: open_store(source, size=8, channels=1)):
        with pytest.raises(ValueError, match=r"new line\.png: not an image$"):
            look(source)


def test_a_header_that_is_no_python(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path / "cache"))
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "a.png")
    before = open_store(open_source(str(tmp_path / "*.png")), size=8, channels=1)
    file = next((tmp_path / "cache").glob("*/sha1.npy"))
    file.write_bytes(file.read_bytes().replace(b"}", b"("))
    (tmp_path / "features.npy").write_bytes(file.read_bytes())
    assert open_store(open_source(str(tmp_path / "*.png")), size=8, channels=1).sha1 == before.sha1
    with pytest.raises(ValueError, match=r"cannot read .*features\.npy"):
        outputs.read_features(tmp_path)


def test_a_map_of_other_images_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.random.default_rng(0).normal(size=(30, 5)))
    finished(Path("run"), "x.npy")
    good = landscape.landscape_of(Path("run"))
    for name, wrong in (("positions", good.positions[:2]), ("neighbours", good.neighbours + 30)):
        np.savez("run/map.npz", **{**np.load("run/map.npz"), name: wrong})
        assert np.array_equal(getattr(landscape.landscape_of(Path("run")), name), getattr(good, name))


def test_heat_maps_of_a_network_that_gives_no_numbers(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    for i in range(12):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8), dtype=np.uint8)).save(f"in/{i}.png")
    finished(Path("run"), "in")
    Path("run/metrics.jsonl").touch()
    weights = load(Path("run/model/model.safetensors").read_bytes())
    Path("run/model/model.safetensors").write_bytes(save(weights | {"backbone.0.std": weights["backbone.0.std"] * 0}))
    assert command(["report", "run", "--quiet"], capfd) == 0


def begun():
    """The state of a run after one step, and the widths of its heads."""
    recipe = make_recipe("deepcluster", n_clusters=3)
    state = start(make_model(recipe), tiny_store(20), recipe, Training())
    sum(z.square().sum() for z in state.model([torch.rand(4, 1, 8, 8)])).backward()
    state.optimizer.step()
    return state, recipe.heads


@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: saved["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)),  # would be read beyond its end
        lambda saved: saved["optimizer"]["state"][0].pop("exp_avg_sq"),
        lambda saved: saved["optimizer"]["state"][0].update(step=torch.zeros(2)),
        lambda saved: saved.update(labels=saved["labels"] + 1000),
        lambda saved: saved.update(partners=saved["partners"] + 20),
        lambda saved: saved.update(partners=saved["partners"].float()),
        lambda saved: saved.update(network=[]),
    ],
)
def test_a_checkpoint_that_would_crash_the_next_step(damage, tmp_path):
    state, widths = begun()
    checkpoint.save(tmp_path / "last.pt", state)
    saved = checkpoint.read(tmp_path / "last.pt")
    checkpoint.restore(saved, begun()[0], widths)
    damage(saved)
    with pytest.raises(ValueError, match=r"the checkpoint does not fit config\.json"):
        checkpoint.restore(saved, begun()[0], widths)
