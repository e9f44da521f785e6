"""Learning with a few labels: the losses, what training may see, what is scored, what is refused."""

import csv
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.base import clone
from tiny import tiny_store

from deepcluster import DeepCluster, dist, evaluate, load, losses, plan
from deepcluster.__main__ import main
from deepcluster.batches import train_batches
from deepcluster.log import Metrics
from deepcluster.methods.fixmatch import ANNEALING, Match
from deepcluster.methods.meanteacher import Consistency
from deepcluster.methods.pseudolabel import PseudoLabel
from deepcluster.methods.vat import Smoothness
from deepcluster.recipe import Clock, Recipe, Targets, make_recipe
from deepcluster.settings import Settings

LEARN = ["pseudolabel", "vat", "meanteacher", "fixmatch"]
every_learner = pytest.mark.parametrize("name", LEARN)
LATE = Clock(9, 10)
KEYS = {"use_labels", "n_labelled", "labels_sha1"}

# --- losses ---


def logits_of(views, seed=0, b=6, k=4):
    return 3 * torch.randn(views, b, k, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([2, -1, -1, 0, -1, -1], dtype=torch.int32)


def xent(z, target):
    return -float(z.double().log_softmax(0)[int(target)])


def given_term(z):
    """Mean cross-entropy of images 0 and 3, the labelled ones."""
    return (xent(z[0], 2) + xent(z[3], 0)) / 2


def test_the_labelled_term_is_the_mean_over_labelled_images():
    z = logits_of(1)[0]
    assert losses.few_labels(z, LABELS).item() == pytest.approx(given_term(z), abs=1e-6)
    assert losses.few_labels(z, torch.full((6,), -1)).item() == 0
    assert losses.few_labels(torch.zeros(6, 4), LABELS).item() == pytest.approx(math.log(4), abs=1e-6)


def test_means_are_over_the_images_of_all_processes(monkeypatch):
    """Not over one process's: those are few, and would weigh more where they are fewer."""
    other = torch.tensor([8.0, 2.0])  # the other process's sum and count
    monkeypatch.setattr(dist, "all_sum", lambda x: x + other)
    values, mask = torch.tensor([1.0, 3.0, 100.0]), torch.tensor([True, True, False])
    assert losses.masked_mean(values, mask).item() == pytest.approx((1 + 3 + 8) / 4)


@pytest.mark.parametrize(("progress", "alpha"), [(0, 0), (0.1, 0), (0.35, 1.5), (0.6, 3), (0.9, 3)])
def test_the_weight_of_own_labels_rises_and_stays(progress, alpha):
    assert PseudoLabel().alpha(Clock(0, 1, round(progress * 100), 100)) == pytest.approx(alpha)


def test_pseudolabel_by_hand():
    z = logits_of(1)
    own = np.mean([xent(z[0, i], z[0, i].argmax()) for i in (1, 2, 4, 5)])
    assert PseudoLabel()(z, LABELS, LATE).item() == pytest.approx(given_term(z[0]) + 3 * own, abs=1e-5)
    assert PseudoLabel()(z, LABELS, Clock(0, 10)).item() == pytest.approx(given_term(z[0]), abs=1e-6)


def test_vat_by_hand():
    z = logits_of(2)
    p, q = z.double().softmax(-1)
    kl = (p * (p.log() - q.log())).sum(1).mean().item()
    entropy = -(p * p.log()).sum(1).mean().item()
    assert Smoothness(2.0, 0.0)(z, LABELS, LATE).item() == pytest.approx(given_term(z[0]) + 2 * kl, abs=1e-5)
    both = given_term(z[0]) + kl + 0.5 * entropy
    assert Smoothness(1.0, 0.5)(z, LABELS, LATE).item() == pytest.approx(both, abs=1e-5)


def test_vat_moves_the_answer_towards_the_image_and_not_back():
    z = logits_of(2).requires_grad_()
    Smoothness(1.0, 0.0)(z, torch.full((6,), -1), LATE).backward()
    assert z.grad[0].abs().max() == 0
    assert z.grad[1].abs().max() > 0


@pytest.mark.parametrize(("epoch", "w"), [(0, 100 * math.exp(-5)), (1, 100 * math.exp(-1.8)), (3, 100), (9, 100)])
def test_the_weight_of_consistency_rises_as_the_paper_says(epoch, w):
    assert Consistency(100.0, 0.25).w(Clock(epoch, 10)) == pytest.approx(w)


def test_meanteacher_by_hand():
    z = logits_of(4)
    p = z.double().softmax(-1)
    apart = np.mean([((p[s, i] - p[t, i]) ** 2).mean().item() for s, t in ((0, 3), (1, 2)) for i in range(6)])
    given = (given_term(z[0]) + given_term(z[1])) / 2
    assert Consistency(100.0)(z, LABELS, LATE).item() == pytest.approx(given + 100 * apart, abs=1e-4)
    z.requires_grad_()
    Consistency()(z, LABELS, LATE).backward()
    assert z.grad[2:].abs().max() == 0


def test_fixmatch_by_hand():
    z = logits_of(2)
    q = z[0].double().softmax(-1)
    sure = [i for i in (1, 2, 4, 5) if q[i].max() >= 0.7]
    assert 0 < len(sure) < 4, "the test must have both kinds"
    matched = sum(xent(z[1, i], q[i].argmax()) for i in sure) / 4
    assert Match(2.0, 0.7)(z, LABELS, LATE).item() == pytest.approx(given_term(z[0]) + 2 * matched, abs=1e-5)
    z.requires_grad_()
    Match(1.0, 0.7)(z, torch.full((6,), -1), LATE).backward()
    assert z.grad[0].abs().max() == 0  # the weak view is a teacher
    assert [i for i in range(6) if z.grad[1, i].abs().max() > 0] == [i for i in range(6) if q[i].max() >= 0.7]


def test_uda_by_hand():
    z = logits_of(2)
    q, target, p = (x.double().softmax(-1) for x in (z[0], z[0] / 0.4, z[1]))
    kl = (target * (target.log() - p.log())).sum(1)
    matched = sum(kl[i].item() for i in (1, 2, 4, 5) if q[i].max() >= 0.7) / 4
    assert Match(1.0, 0.7, 0.4)(z, LABELS, LATE).item() == pytest.approx(given_term(z[0]) + matched, abs=1e-5)
    same = (logits_of(1)[0] / 0.4)[None]
    agreeing = torch.cat([same * 0.4, same])
    assert Match(1.0, 0.0, 0.4)(agreeing, -torch.ones(6), LATE).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("tsa", "middle"), [("linear", 0.5), ("log", 1 - math.exp(-2.5)), ("exp", math.exp(-2.5)), ("none", None)]
)
def test_signal_annealing_leaves_out_labels_that_are_learnt(tsa, middle):
    z, half = logits_of(1, b=50)[0], Clock(5, 10)
    labels = torch.arange(50, dtype=torch.int32) % 4
    right = z.softmax(1)[torch.arange(50), labels.long()]
    kept = Match(tsa=tsa).annealed(z, labels, half)
    limit = 1.1 if middle is None else middle * 0.75 + 0.25
    assert torch.equal(kept, torch.where(right <= limit, labels, -1))
    assert 0 < (kept < 0).sum() < 50 or tsa == "none"
    for start in ANNEALING.values():
        assert start(0) == pytest.approx(0, abs=0.01)
        assert start(1) == pytest.approx(1, abs=0.01)


@every_learner
@pytest.mark.parametrize("options", [{}, {"uda": True, "tsa": "log"}], ids=str)
@pytest.mark.parametrize("kind", ["equal", "one-hot"])
def test_collapsed_answers_have_a_finite_loss_and_gradient(name, options, kind):
    if options and name != "fixmatch":
        return
    z = torch.zeros(4, 6, 4)
    if kind == "one-hot":
        z[..., 1] = 1e4
    z.requires_grad_()
    views = {"fixmatch": 2, "meanteacher": 4, "vat": 2, "pseudolabel": 1}[name]
    loss = make_recipe(name, n_clusters=4, **options).objective(z[:views], LABELS, LATE)
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()


# --- batches ---


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_process_gets_its_share_of_labelled_images(world, monkeypatch):
    labels = torch.full((1, 96), -1, dtype=torch.int32)
    labels[0, :6] = torch.tensor([0, 0, 0, 0, 0, 1])
    recipe = Recipe((2,), losses.pseudo_label, views=("clean",), supervised=0.5)
    seen = []
    for rank in range(world):
        monkeypatch.setattr(dist, "world", lambda: world)
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        targets = Targets(labels, torch.arange(96)[:, None])
        for batch in train_batches(tiny_store(), targets, recipe, 32, seed=1):
            drawn = labels[0, batch.ids]
            assert (drawn >= 0).sum() >= 16 // world
            seen.append(batch.ids)
    ids = torch.cat(seen)
    assert len(ids) == 96
    few = torch.bincount(labels[0, ids][labels[0, ids] >= 0].long())
    assert abs(int(few[0] - few[1])) <= 6  # by label; what is more comes from the other half of the batch
    assert len(set(ids.tolist())) >= 40


def test_a_share_is_a_share():
    with pytest.raises(ValueError, match="supervised is a share"):
        Recipe((2,), losses.pseudo_label, supervised=1.0)


# --- whole runs ---

QUICK = ["--epochs", "2", "--image-size", "8", "--batch-size", "12", "--precision", "fp32", "--quiet"]
FEW = {0: "dark", 1: "bright", 2: "dark", 7: "bright"}  # the rest is not listed
N = 24


def table(path, rows):
    with Path(path).open("w", newline="") as f:
        csv.writer(f).writerows([("path", "label"), *rows])


def draw(labels):
    """x.npz: even images are dark, odd ones bright; ``labels`` are what the source says of them."""
    rng = np.random.default_rng(0)
    images = (rng.integers(0, 60, (N, 8, 8)) + 150 * (np.arange(N) % 2)[:, None, None]).astype(np.uint8)
    np.savez("x.npz", images=images, labels=labels)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw(np.arange(N) % 2)
    table("few.csv", [(f"x.npz#{i}", name) for i, name in FEW.items()])
    table("all.csv", [(f"x.npz#{i}", ["dark", "bright"][i % 2]) for i in range(N)])
    return tmp_path


def fit(*args, method="fixmatch", out="run", labels="few.csv"):
    return main(["fit", "x.npz", "--out", out, "--method", method, "--labels", labels, "--use-labels", *QUICK, *args])


def refused(capsys, code, *said):
    shown = capsys.readouterr()
    assert code == 2, shown
    assert shown.err.count("\n") == 1, shown.err
    for text in said:
        assert text in shown.err, shown.err


def weights(run):
    return (Path(run) / "model/model.safetensors").read_bytes()


@every_learner
def test_a_run_learns_names_and_says_so(here, capsys, name):
    assert fit("--epochs", "4", method=name) == 0
    shown = capsys.readouterr()
    assert "4 labels were used in training" in shown.out
    assert "(of 20 other images)" in shown.out
    assert "4 labels are used in training: of bright, dark" in Path("run/train.log").read_text()
    data = json.loads(Path("run/config.json").read_text())["data"]
    assert (data["use_labels"], data["labels"], data["n_labelled"]) == (True, "few.csv", 4)
    found = pq.read_table("run/assignments.parquet")
    assert np.flatnonzero(found["given"].to_numpy()).tolist() == list(FEW)
    names = json.loads(Path("run/model/names.json").read_text())
    assert sorted(names) == ["bright", "dark"]
    assert found["name"].to_pylist() == [names[c] for c in found["cluster"].to_pylist()]
    groups = pq.read_table("run/clusters.parquet").to_pylist()
    assert [row["name"] for row in groups] == [names[row["id"]] for row in groups]
    assert [row["size"] for row in groups] == sorted((row["size"] for row in groups), reverse=True)


def test_clusters_get_the_right_names(here):
    """Bright and dark are told apart by anything that learnt at all; swapped names would be wrong everywhere."""
    assert fit("--epochs", "60", "--lr", "0.01", "--seed", "1") == 0
    found = pq.read_table("run/assignments.parquet")["name"].to_pylist()
    assert np.mean([name == ["dark", "bright"][i % 2] for i, name in enumerate(found)]) > 0.9


def test_a_plan_may_end_with_it_and_predict_uses_the_names(here):
    assert fit("--set", "iic.overcluster=1", method="iic+meanteacher") == 0
    assert [row["stage"] for row in map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())] == [0, 0, 1, 1]
    assert main(["predict", "run", "x.npz", "--out", "p.parquet", "--quiet"]) == 0
    found, first = pq.read_table("p.parquet"), pq.read_table("run/assignments.parquet")
    assert found["name"].to_pylist() == first["name"].to_pylist()
    assert "given" not in found.column_names


def test_an_ordinary_run_has_no_trace_of_it(here):
    args = ["x.npz", "--out", "run", "--method", "iic", "--n-clusters", "2", "--labels", "few.csv", *QUICK]
    assert main(["fit", *args]) == 0
    assert "given" not in pq.read_table("run/assignments.parquet").column_names
    assert not KEYS & set(json.loads(Path("run/config.json").read_text())["data"])
    assert json.loads(Path("run/model/names.json").read_text()) == ["", ""]
    assert "used in training" not in Path("run/train.log").read_text()


@every_learner
def test_labels_of_other_images_never_reach_training(here, name):
    assert fit(method=name, out="a") == 0
    other = np.random.default_rng(1).permutation(N) % 2
    other[list(FEW)] = -1
    draw(other)
    assert fit(method=name, out="b") == 0
    assert weights("a") == weights("b")
    assert pq.read_table("a/assignments.parquet").equals(pq.read_table("b/assignments.parquet"))
    table("few.csv", [(f"x.npz#{i}", {"dark": "bright", "bright": "dark"}[FEW[i]]) for i in FEW])
    assert fit(method=name, out="c") == 0
    assert weights("a") != weights("c"), "the listed ones do"


# --- scores ---


def acc_by_hand(run, kept):
    cluster = pq.read_table(f"{run}/assignments.parquet")["cluster"].to_numpy()[kept]
    true = np.arange(N)[kept] % 2
    return max(np.mean(cluster == true), np.mean(cluster != true))


def test_scores_leave_out_images_whose_label_was_given(here, capsys):
    assert fit("--epochs", "1", "--seed", "3") == 0
    others = np.array([i for i in range(N) if i not in FEW])
    last = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert "acc" in last  # of the source's own labels
    capsys.readouterr()
    for labels in ("all.csv", "auto"):
        assert main(["evaluate", "run", "--labels", labels, "--quiet"]) == 0
        scores = json.loads(capsys.readouterr().out)
        assert (scores["n_images"], scores["n_given_left_out"]) == (20, 4)
        assert scores["splits"]["train"]["n_given_left_out"] == 4
        assert scores["acc"] == pytest.approx(acc_by_hand("run", others), abs=1e-6)
    assert "labels of 20 images" in Path("run/report.html").read_text()
    assert main(["report", "run", "--quiet"]) == 0
    assert "labels of 20 images" in Path("run/report.html").read_text()


def test_given_images_are_known_by_their_content_in_another_source(here, capsys):
    assert fit() == 0
    capsys.readouterr()
    saved = np.load("x.npz")
    np.savez("y.npz", images=saved["images"][:10][::-1], labels=saved["labels"][:10][::-1])
    assert main(["evaluate", "run", "y.npz", "--quiet"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["n_images"], scores["n_given_left_out"]) == (6, 4)


def test_scores_in_training_are_of_the_others(here, monkeypatch):
    seen = {}
    keep = plan.run
    monkeypatch.setattr(plan, "run", lambda *a, **k: [seen.update(true=a[3][0].true, known=a[6]), keep(*a, **k)][1])
    assert fit() == 0
    assert (seen["true"] >= 0).tolist() == [i not in FEW for i in range(N)]
    assert (seen["known"] >= 0).tolist() == [i in FEW for i in range(N)]


def test_without_other_labels_there_are_no_scores(here, capsys):
    draw(np.full(N, -1))
    assert fit() == 0
    shown = capsys.readouterr().out
    assert "ACC" not in shown
    assert "acc" not in Path("run/metrics.jsonl").read_text()
    assert main(["evaluate", "run", "--labels", "few.csv", "--quiet"]) == 2
    assert "every label of x.npz in --labels few.csv was given to training" in capsys.readouterr().err
    refused(capsys, main(["evaluate", "run", "--quiet"]), "has no classes to compare with")
    assert main(["report", "run", "--quiet"]) == 0


# --- what is refused ---


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--method", "fixmatch"], ["fixmatch learns from a few known labels", "--labels FILE.csv --use-labels"]),
        (["--method", "iic+vat", "--labels", "few.csv"], ["vat learns from a few known labels"]),
        (["--method", "fixmatch", "--use-labels"], ["add --labels FILE.csv"]),
        (["--method", "fixmatch", "--use-labels", "--labels", "auto"], ["add --labels FILE.csv"]),
        (["--method", "fixmatch", "--use-labels", "--labels", "no.csv"], ["no label file no.csv"]),
        (["--method", "iic", "--use-labels", "--labels", "few.csv"],
         ["iic, the last method", "fixmatch, meanteacher, pseudolabel, vat", "--method iic+fixmatch"]),
        (["--use-labels", "--labels", "few.csv"], ["learns from no labels", "+fixmatch"]),
        (["--method", "fixmatch+sela", "--use-labels", "--labels", "few.csv"], ["sela, the last", "simclr+fixmatch"]),
        (["--method", "simclr", "--use-labels", "--labels", "few.csv"], ["simclr, the last", "simclr+fixmatch"]),
        (["--method", "vat", "--use-labels", "--labels", "few.csv", "--n-clusters", "5"],
         ["2 different labels", "not 5", "--n-clusters) to 2"]),
        (["--method", "vat", "--use-labels", "--labels", "odd.csv"],
         ["2 of 3 rows of odd.csv", "name no image", "'x.npz#99'", "correct or remove"]),
        (["--method", "vat", "--use-labels", "--labels", "two.csv"], ["x.npz#1 the labels 'a' and 'b'", "keep one"]),
        (["--method", "vat", "--use-labels", "--labels", "one.csv"], ["at least 2 different"]),
        (["--method", "fixmatch", "--use-labels", "--labels", "few.csv", "--set", "tsa=lgo"], ["did you mean 'log'"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("end", [["--out", "run"], ["--dry-run"]], ids=["fit", "dry run"])
def test_wrong_input(here, capsys, args, said, end):
    table("odd.csv", [("x.npz#1", "a"), ("x.npz#99", "b"), ("", "a")])
    table("two.csv", [("x.npz#1", "a"), ("x.npz#2", "b"), ("./x.npz#1", "b")])
    table("one.csv", [("x.npz#1", "a"), ("x.npz#2", "a"), ("x.npz#3", "")])
    before = sorted(here.iterdir())
    refused(capsys, main(["fit", "x.npz", *end, *QUICK, *args]), *said)
    assert sorted(here.iterdir()) == before


def test_rows_that_name_no_image_are_only_a_warning_for_scores(here):
    table("odd.csv", [("x.npz#1", "a"), ("x.npz#2", "b"), ("x.npz#99", "a")])
    args = ["--out", "r", "--method", "iic", "--n-clusters", "2", "--labels", "odd.csv", *QUICK]
    assert main(["fit", "x.npz", *args]) == 0


def test_an_empty_label_or_minus_one_is_unknown(here):
    table("few.csv", [("x.npz#0", "dark"), ("x.npz#1", " bright "), ("x.npz#2", ""), ("x.npz#3", "-1")])
    assert fit() == 0
    assert np.flatnonzero(pq.read_table("run/assignments.parquet")["given"].to_numpy()).tolist() == [0, 1]
    assert sorted(json.loads(Path("run/model/names.json").read_text())) == ["bright", "dark"]


def test_a_whole_name_wins_over_the_end_of_another():
    names = ["a.png", "d/a.png", "d/b.png", "e/b.png"]
    assert [evaluate._places(names)(x) for x in ("a.png", "./a.png", "d/a.png", "b.png")] == [0, 0, 1, -1]


def test_a_labelled_image_that_cannot_be_read(caplog):
    known = evaluate.Known(np.array([0, 1, 0, -1]), ["a", "b"])
    assert len(known.of_rows(np.array([1, 2, 3]))) == 2
    assert "1 labelled images cannot be read" in caplog.text
    with pytest.raises(ValueError, match="no image with the label 'b' can be read"):
        known.of_rows(np.array([0, 2, 3]))


def test_a_dry_run_needs_no_labels_of_the_sample(here, capsys):
    args = ["fit", "x.npz", "--dry-run", "--method", "iic+vat", "--labels", "few.csv", "--use-labels", *QUICK]
    assert main(args) == 0
    assert "vat " in capsys.readouterr().out


# --- going on ---


def stopped(monkeypatch, stage, epoch):
    """The next run is interrupted there; returns what undoes this."""

    def crash(self, report):
        if (report.state.stage, report.clock.epoch) == (stage, epoch):
            raise KeyboardInterrupt
        return call(self, report)

    call = Metrics.__call__
    monkeypatch.setattr(Metrics, "__call__", crash)
    return lambda: monkeypatch.setattr(Metrics, "__call__", call)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stopped_run_goes_on_with_the_same_labels(here, capsys, monkeypatch, stage):
    method = "iic+fixmatch"
    assert fit(method=method, out="whole") == 0
    mend = stopped(monkeypatch, stage, 1)
    assert fit(method=method) == 130
    mend()
    assert "4 labels are used" in Path("run/train.log").read_text()
    text = Path("few.csv").read_text()
    table("few.csv", [(f"x.npz#{i}", name) for i, name in list(FEW.items())[:3]])
    capsys.readouterr()
    refused(capsys, main(["fit", "--resume", "run", "--quiet"]), "few.csv has other labels than the 4", "--overwrite")
    refused(capsys, main(["fit", "--resume", "run", "--use-labels", "--quiet"]), "--use-labels cannot be given with")
    Path("moved.csv").write_text(text)
    assert main(["fit", "--resume", "run", "--labels", "moved.csv", "--quiet"]) == 0
    assert weights("run") == weights("whole")
    for name in ("assignments.parquet", "clusters.parquet"):
        assert (Path("run") / name).read_bytes() == (Path("whole") / name).read_bytes()
    scores = [
        [json.loads(x)["acc"] for x in (Path(r) / "metrics.jsonl").read_text().splitlines()] for r in ("run", "whole")
    ]
    assert scores[0] == scores[1]


@pytest.mark.slow
@pytest.mark.ddp
def test_two_processes(here):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    words = ["fit", "x.npz", "--out", "run", "--method", "meanteacher", "--labels", "few.csv", "--use-labels", *QUICK]
    started = [
        subprocess.Popen([sys.executable, "-m", "deepcluster", *words, "--device", "cpu"], stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True, env={**os.environ, **where, "RANK": str(rank)})
        for rank in range(2)
    ]  # fmt: skip
    ends = [one.communicate(timeout=300) for one in started]
    assert [one.returncode for one in started] == [0, 0], ends
    assert [out.count("4 labels were used in training") for out, _ in ends] == [1, 0]
    assert sum(pq.read_table("run/assignments.parquet")["given"].to_pylist()) == 4


# --- in Python ---

X = np.random.default_rng(0).normal(size=(N, 5)).astype(np.float32)
SHORT = {"n_clusters": 2, "method": "fixmatch", "epochs": 1, "batch_size": 12, "precision": "fp32"}


@pytest.mark.parametrize(
    "y",
    [
        np.where(np.arange(N) < 6, np.arange(N) % 2, -1),
        np.where(np.arange(N) < 6, np.arange(N) % 2, np.nan),
        [str(i % 2) if i < 6 else None for i in range(N)],
        np.array([str(i % 2) if i < 6 else "" for i in range(N)]),
    ],
    ids=["numbers", "nan", "strings", "array of strings"],
)
def test_y_is_learnt_from_where_it_is_asked_for(tmp_path, y):
    model = DeepCluster(**SHORT, use_labels=True, out=tmp_path / "run").fit(X, y)
    assert sorted(model.classifier_.names) == ["0", "1"]
    assert model.n_labelled_ == 6
    assert load(tmp_path / "run").classifier_.names == model.classifier_.names
    given = pq.read_table(tmp_path / "run/assignments.parquet")["given"].to_numpy()
    assert given.nonzero()[0].tolist() == [0, 1, 2, 3, 4, 5]
    other = DeepCluster(**SHORT, use_labels=True).fit(X, np.where(np.arange(N) < 6, np.arange(N) % 2, -1))
    assert np.array_equal(model.predict_proba(X), other.predict_proba(X))


def test_a_run_with_y_can_only_go_on_with_a_file_of_the_same_labels(here):
    np.save("x.npy", X)
    y = np.where(np.arange(N) < 6, np.arange(N) % 2, -1)
    DeepCluster(**SHORT, use_labels=True, out="run").fit("x.npy", y)
    with pytest.raises(ValueError, match="y in Python; write them to a file and add --labels"):
        DeepCluster(out="run")._resume()
    table("y.csv", [(f"x.npy#{i}", i % 2) for i in range(6)])
    before = weights("run")
    assert DeepCluster(out="run")._resume("y.csv").n_labelled_ == 6
    assert weights("run") == before


def test_wrong_y():
    model = DeepCluster(**SHORT, use_labels=True)
    assert clone(model).use_labels
    with pytest.raises(ValueError, match=r"call fit\(X, y\)"):
        model.fit(X)
    with pytest.raises(ValueError, match=r"each of the 24 images, -1 where it is unknown; got shape \(3,\)"):
        model.fit(X, [0, 1, 0])
    with pytest.raises(ValueError, match=r"y has 3 different labels.*not 2"):
        model.fit(X, np.arange(N) % 3)
    with pytest.raises(ValueError, match="at least 2 different"):
        model.fit(X, np.full(N, -1))
    with pytest.raises(ValueError, match="use_labels=True and fit"):
        DeepCluster(**SHORT).fit(X, np.arange(N) % 2)


def test_use_labels_is_yes_or_no():
    with pytest.raises(ValueError, match="use_labels must be true or false"):
        Settings(use_labels="few.csv")


def test_score_leaves_given_images_out_also_after_loading(tmp_path):
    x = np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8)
    y = np.where(np.arange(40) < 20, np.arange(40) % 2, -1)
    options = {"epochs": 1, "batch_size": 10, "image_size": 8, "out": tmp_path / "run"}
    model = DeepCluster(2, method="fixmatch", use_labels=True, **options).fit(x, y)
    labels = np.concatenate([np.arange(20) % 2, model.labels_[20:]])  # right wherever training was not given the label
    wrong = np.concatenate([1 - model.labels_[:20], model.labels_[20:]])  # and wrong wherever it was
    for one in (model, load(tmp_path / "run")):
        assert one.score(x, labels) == one.score(x, wrong) == 1
