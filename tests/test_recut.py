"""Another number of clusters without training: the run obeys it in every way, and undo takes it back."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_howmany import groups
from tiny import join, leave, two_ranks

from deepcluster import DeepCluster, edits, load, recut
from deepcluster.__main__ import main
from deepcluster.classifier import Classifier
from deepcluster.howmany import evidence

GROUPS = 4
FAST = {"method": "sela", "epochs": 2, "batch_size": 64, "quiet": True}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Features in four groups, as a file, and the groups."""
    x, y = groups(GROUPS, dim=8)
    file = tmp_path_factory.mktemp("source") / "x.npy"
    np.save(file, x)
    return file, x, y


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """A run that found its number of clusters itself."""
    out = tmp_path_factory.mktemp("runs") / "a"
    return DeepCluster("auto", out=str(out), **FAST).fit(str(source[0])), out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    return shutil.copytree(finished[1], tmp_path / "run")


def same_groups(labels, y):
    return len(set(zip(labels.tolist(), y.tolist(), strict=True))) == len(set(y.tolist())) == len(set(labels.tolist()))


def by_size(labels):
    sizes = np.bincount(labels)
    return (np.diff(sizes) <= 0).all() and sizes.min() > 0


def test_auto_finds_the_groups_and_predicts_them(finished, source):
    model, out = finished
    _, x, y = source
    assert same_groups(model.labels_, y)
    assert by_size(model.labels_)
    assert (model.predict(x) == model.labels_).all()
    p = model.predict_proba(x)
    assert p.shape == (len(x), GROUPS)
    assert np.allclose(p.sum(1), 1, atol=1e-5)
    assert (p.argmax(1) == model.labels_).all()
    assert model.plan_.auto_k
    assert model.plan_.n_clusters == round(len(x) ** 0.5)
    again = load(out)
    assert again.n_clusters == "auto"
    assert (again.predict(x) == model.labels_).all()
    assert DeepCluster.from_pretrained(out / "model").predict(x).tolist() == model.labels_.tolist()
    assert (out / recut.FILE).exists()


def test_auto_without_a_run_directory(finished, source):
    model = DeepCluster("auto", **FAST).fit(source[1])
    assert (model.labels_ == finished[0].labels_).all()
    assert set(model.recut(6).labels_.tolist()) == set(range(6))


def test_auto_resumed_is_the_same(finished, run, source):
    again = DeepCluster("auto", out=str(run), **FAST)._resume()
    assert (again.labels_ == finished[0].labels_).all()
    assert len(again.classifier_.steps) == 1
    (run / "model" / "edits.safetensors").unlink()  # stopped before its end
    (run / recut.FILE).unlink()
    (run / "assignments.parquet").unlink()
    again = DeepCluster("auto", out=str(run), **FAST)._resume()
    assert (again.labels_ == finished[0].labels_).all()


def test_no_structure_is_said_and_cut_in_two(monkeypatch, caplog):
    x = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    with caplog.at_level("WARNING", logger="deepcluster"):
        made = recut.first(x, None, 0)
    assert "no cluster structure" in caplog.text
    assert max(made.groups) == 1


def test_groups_that_a_network_made_of_noise_are_none(source, caplog):
    noise = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    assert max(recut.first(source[1], None, 0).groups) == GROUPS - 1
    assert max(recut.first(source[1], None, 0, noise).groups) == 1
    assert "no cluster structure" in caplog.text


def test_recut_and_undo(run, source):
    _, x, _ = source
    model = load(run).set_cluster_names({0: "vans"}).merge_clusters([[1, 2]])
    before = model.labels_
    model.recut(9)
    assert by_size(model.labels_)
    assert len(set(model.labels_.tolist())) == 9
    assert model.classifier_.names == [""] * 9
    assert (load(run).predict(x) == model.labels_).all()
    model.recut(3).merge_clusters([[0, 2]])
    assert set(model.labels_.tolist()) == {0, 1}
    model.undo().undo()
    assert len(set(load(run).labels_.tolist())) == 9
    model.undo()
    assert (model.labels_ == before).all()
    assert model.classifier_.names[0] == "vans"


def test_cuts_are_nested(run):
    model = load(run)
    fine, coarse = model.recut(12).labels_, model.recut(5).labels_
    assert len(set(zip(fine.tolist(), coarse.tolist(), strict=True))) <= 14  # near borders single images may differ
    assert model.recut(GROUPS).undo().undo().undo() is model


def test_of_a_run_with_a_given_number(source, tmp_path):
    out = tmp_path / "given"
    model = DeepCluster(3, out=str(out), **FAST).fit(str(source[0]))
    assert not (out / recut.FILE).exists()
    assert len(set(model.recut(7).labels_.tolist())) == 7
    assert (out / recut.FILE).exists()


def test_evidence_is_kept_and_made_anew_for_other_features(run, monkeypatch):
    kept = recut.evidence_of(run)
    monkeypatch.setattr(recut, "evidence", lambda *a, **kw: pytest.fail("made anew"))
    assert recut.evidence_of(run).to_dict() == kept.to_dict()
    (run / recut.FILE).write_bytes(b"damaged")
    monkeypatch.setattr(recut, "evidence", evidence)
    assert recut.evidence_of(run, 2, None, 0).to_dict() == kept.to_dict()
    x = np.load(run / "features.npy")
    np.save(run / "features.npy", x[::-1])
    assert recut.evidence_of(run).to_dict() != kept.to_dict()


@pytest.mark.parametrize("k", ["1", "0", "100000"])
def test_cuts_that_cannot_be(run, k, capsys):
    assert main(["recut", str(run), "--k", k]) == 2
    assert "can be cut into 2 to " in capsys.readouterr().err


def test_a_damaged_cut_is_refused(run):
    for wrong in [(0, 2, 1, 5), (10**12,) * 4, (), (-1, 0, 1, 0)]:
        made = edits.Recut(torch.zeros(4, 8), wrong, 1.0)
        (run / "model" / "edits.safetensors").write_bytes(edits.pack([""] * 3, [edits.Step((made,))], {}))
        with pytest.raises(ValueError, match="cannot read the model"):
            Classifier.load(run / "model", torch.device("cpu"))


def test_the_command_k_of_a_run(run, capsys):
    assert main(["k", str(run), "--quiet"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["k", "stability", "generalisation", "separation", "gain", "answer"]
    assert said[GROUPS - 1].split()[0] == str(GROUPS)
    assert said[GROUPS - 1].endswith("***")
    assert any(line.startswith(f"{GROUPS} clusters: between any two") for line in said)
    page = (run / "k.html").read_text()
    assert page.count("<svg") == 4
    assert f'<section id="k{GROUPS}">' in page
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert main(["recut", str(run), "--k", "6"]) == 0
    assert "6 clusters, numbered by size" in capsys.readouterr().out
    assert main(["evaluate", str(run)]) == 2  # there are no labels
    assert main(["report", str(run)]) == 0
    assert "6 clusters, as many as" in (run / "report.html").read_text()


def test_the_command_k_of_features(source, capsys):
    assert main(["k", str(source[0]), "--json", "--max", "10"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["answers"][0] == GROUPS
    assert [row["k"] for row in said["rows"]] == list(range(2, 11))
    assert said["sentence"].startswith("4 clusters")


def test_the_command_k_of_images_needs_features(capsys):
    assert main(["k", "digits"]) == 2
    assert "name a pretrained --backbone, or train first: deepcluster fit" in capsys.readouterr().err


def test_images_are_shown_and_paths_are_escaped(tmp_path, capsys):
    from PIL import Image

    folder, rng = tmp_path / "<img src=x>", np.random.default_rng(0)
    folder.mkdir()
    for i in range(90):
        picture = np.full((12, 12), 60 * (i % 3) + 40) + rng.integers(0, 30, (12, 12))
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{i}.png")
    run = tmp_path / "run"
    DeepCluster(3, out=str(run), **FAST).fit(str(folder))
    found = recut.evidence_of(run)
    assert main(["k", str(run)]) == 0
    page = (run / "k.html").read_text()
    assert "<img src=x>" not in page
    assert page.count("data:image/webp") >= len(found.answers)


def test_in_settings(tmp_path):
    with pytest.raises(ValueError, match="n_clusters must be a whole number of at least 2 or auto; got 'many'"):
        DeepCluster("many").fit(np.zeros((9, 3)))
    with pytest.raises(ValueError, match="as many clusters as labels; set n_clusters"):
        DeepCluster("auto", use_labels=True, method="fixmatch").fit(np.zeros((9, 3)), [0, 1, -1] * 3)
    with pytest.raises(ValueError, match="20 images are too few to tell how many clusters there are"):
        DeepCluster("auto").fit(np.random.default_rng(0).normal(size=(20, 3)))


def test_export_obeys(run, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    import onnxruntime

    assert main(["recut", str(run), "--k", "6"]) == 0
    assert main(["export", str(run), "--format", "onnx", "--out", str(tmp_path / "m.onnx")]) == 0
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    x = np.load(json.loads((run / "config.json").read_text())["data"]["source"])
    out = session.run(None, {session.get_inputs()[0].name: x[:50]})
    assert any(np.array_equal(one, load(run).predict(x[:50])) for one in out)


def work(rank, port, folder):
    join(rank, port)
    model = DeepCluster("auto", out=str(folder / "run"), **FAST).fit(str(folder / "x.npy"))
    found = {"labels": torch.from_numpy(model.labels_), "k": model.classifier_.n_clusters}
    found |= {"p": torch.from_numpy(model.predict_proba(np.load(folder / "x.npy")[:20])) if rank == 0 else None}
    torch.save(found, folder / f"{rank}.pt")
    leave()


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes(source, finished, tmp_path):
    np.save(tmp_path / "x.npy", source[1])
    one, other = two_ranks(work, tmp_path)
    assert one["k"] == other["k"] == GROUPS
    assert (one["labels"] == other["labels"]).all()
    assert same_groups(one["labels"].numpy(), source[2])
