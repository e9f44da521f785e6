"""From settings to numbers. What the numbers are is measured elsewhere; here: all is resolved, checked and kept."""

import json

import pytest
import torch

from deepcluster import plan
from deepcluster.backbones import make_backbone
from deepcluster.losses import pseudo_label
from deepcluster.plan import TOGETHER, Plan, check, resolve
from deepcluster.recipe import METHODS, PAPER, Recipe, make_recipe, method
from deepcluster.settings import Settings
from deepcluster.store import Probe

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32), (3, 96, 96), (7,)])
@pytest.mark.parametrize("n", [40, 10_000, 100_000])
def test_every_auto_becomes_a_number_and_survives_json(shape, n):
    made = resolve(Settings(n_clusters=7), n, shape, CPU)
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert made.n_clusters == 7
    assert made.shape == shape
    for stage in made.stages:
        assert stage.epochs >= 1
        assert 2 <= stage.batch_size <= n
        assert stage.lr > 0
        assert stage.recipe().heads
    assert "auto" not in (made.backbone, *[s.method for s in made.stages])
    assert made.stages[-1].recipe().heads[0] == 7


def test_what_is_asked_for_is_taken():
    asked = Settings(
        method="simclr+sela", n_clusters=4, backbone="resnet18", epochs=3, batch_size=16, lr=0.5, seed=9,
        precision="fp32", overcluster=3, params={"sela.overcluster": 2},
    )  # fmt: skip
    made = resolve(asked, 100, (3, 32, 32), CPU)
    assert [s.method for s in made.stages] == ["simclr", "sela"]
    assert {(s.epochs, s.batch_size, s.lr) for s in made.stages} == {(3, 16, 0.5)}
    assert (made.backbone, made.seed, made.bf16) == ("resnet18", 9, False)
    assert made.stages[1].params["overcluster"] == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "selaa"}, "did you mean 'sela'"),
        ({"method": "sela+"}, "unknown method ''"),
        ({"method": "simclr"}, "let a clustering method follow"),
        ({"method": "sela", "params": {"simclr.view": "crop"}}, "has no parameter"),
        ({"method": "uic", "overcluster": 3}, "uic has no overclustering heads; leave --overcluster out"),
        ({"method": "moco+sela", "params": {"moco.teacher": 1.5}}, "momentum must be between 0 and 1; got 1.5"),
        ({"method": "selflabel"}, "let one come right before it"),
        ({"method": "fixmatch"}, "give them with --labels FILE.csv --use-labels"),
        ({"method": "iic", "use_labels": True}, "iic, the last method, learns from no labels"),
        ({"backbone": "convnett"}, "did you mean 'convnet'"),
    ],
)
def test_wrong_names_before_any_image_is_read(settings, said):
    with pytest.raises(ValueError, match=said):
        check(Settings(**settings))


@pytest.mark.parametrize(
    ("settings", "shape", "said"),
    [
        ({"n_clusters": 50}, (1, 8, 8), "40 images cannot make 50 clusters"),
        ({"batch_size": 41}, (1, 8, 8), "40 training images"),
        ({"backbone": "alexnet"}, (3, 32, 32), "at least 64 px"),
        ({"backbone": "mlp"}, (3, 32, 32), "mlp takes vectors"),
        ({"backbone": "convnet"}, (5,), "convnet takes images"),
        ({"backbone": "torchvision:resnet19"}, (3, 32, 32), "did you mean"),
        ({"params": {"zzz": 1}}, (3, 32, 32), "no parameter 'zzz'"),
    ],
)
def test_what_does_not_fit_the_data(settings, shape, said):
    with pytest.raises(ValueError, match=said):
        resolve(Settings(**settings), 40, shape, CPU)


@pytest.mark.parametrize("field", ["n_clusters", "overcluster", "image_size", "epochs", "batch_size", "lr", "seed"])
@pytest.mark.parametrize("value", [-1, True, "7", float("nan"), None])
def test_wrong_values(field, value):
    with pytest.raises(ValueError, match=f"{field} must be"):
        Settings(**{field: value})


def test_image_size_is_never_more_than_the_images_have_unless_they_are_tiny():
    assert plan.image_size(Probe(100, 40, 3), CPU) <= 40
    assert plan.image_size(Probe(4000, 3000, 3), CPU) <= 128


def test_weights_and_init_from_exclude_each_other():
    with pytest.raises(ValueError, match="give one of them"):
        Settings(weights="a", init_from="b")


def test_training_starts_from_the_weights(tmp_path):
    net, _ = make_backbone("convnet", (1, 8, 8))
    torch.save(net[-1].state_dict(), tmp_path / "w.pth")
    made = resolve(Settings(weights=str(tmp_path / "w.pth")), 40, (1, 8, 8), CPU)
    start, _ = plan.starting_point(made)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), start.parameters(), strict=True))


def test_n_clusters_cannot_be_set_behind_the_back_of_the_plan():
    for key in ("n_clusters", "iic.n_clusters"):
        with pytest.raises(ValueError, match="use --n-clusters 5"):
            resolve(Settings(method="iic", params={key: 5}), 100, (1, 16, 16), torch.device("cpu"))


@pytest.mark.parametrize("name", ["torchvision:vit_b_16", "torchvision:googlenet"])
@pytest.mark.filterwarnings("ignore")
def test_a_backbone_that_cannot_run_is_refused_before_anything_is_written(name):
    with pytest.raises(ValueError, match=rf"the backbone {name} does not work on 3x40x40 images: .*--image-size"):
        resolve(Settings(backbone=name, method="sela"), 100, (3, 40, 40), torch.device("cpu"))


# --- what a method may ask for ---


@pytest.fixture
def toy():
    """A method that asks for all there is; forgotten afterwards."""

    @method(lr=0.25, momentum=0.9, weight_decay=0.0, batch_size=1000, width=7)
    def toy(n_clusters: int = 10, overcluster: int = 5, width: int = 3, view: str = "strong") -> Recipe:
        least = n_clusters * overcluster * 2
        return Recipe((n_clusters,), pseudo_label, views=(view,), least_batch=least, continues=width == 1, passes=2.0)

    yield toy
    del METHODS["toy"], PAPER["toy"]


def one(n=400, **settings):
    return resolve(Settings(**{"method": "toy", "precision": "fp32"} | settings), n, (1, 16, 16), CPU).stages[-1]


def test_the_papers_preset_sets_parameters_and_optimiser_and_the_user_has_the_last_word(toy):
    plain, paper = one(), one(preset="paper")
    assert (plain.lr, plain.momentum, plain.weight_decay, plain.params["width"]) == (2e-3, None, 1e-4, 3)
    assert (paper.lr, paper.momentum, paper.weight_decay, paper.params["width"]) == (0.25, 0.9, 0.0, 7)
    assert paper.batch_size == 400  # as many as there are
    mine = one(preset="paper", lr=0.1, batch_size=150, params={"width": 5})
    assert (mine.lr, mine.momentum, mine.batch_size, mine.params["width"]) == (0.1, 0.9, 150, 5)


def test_a_method_may_learn_at_a_pace_of_its_own_unless_told():
    made = resolve(Settings(method="iic+selflabel"), 400, (1, 16, 16), CPU).stages
    assert made[1].lr == pytest.approx(made[0].lr / 20)
    asked = resolve(Settings(method="iic+selflabel", lr=0.5), 400, (1, 16, 16), CPU).stages
    assert [s.lr for s in asked] == [0.5, 0.5]


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="preset must be default or paper; got 'papr'"):
        Settings(preset="papr")


def test_a_preset_of_a_parameter_that_is_none_is_a_mistake():
    with pytest.raises(ValueError, match="did you mean 'n_clusters'"):

        @method(n_cluster=3)
        def wrong(n_clusters: int = 10) -> Recipe:
            raise AssertionError

    assert "wrong" not in METHODS


def test_the_batch_is_raised_to_what_the_loss_needs_and_less_is_refused(toy):
    assert one(n=2000).batch_size == 256
    assert one(n=2000, n_clusters=40, overcluster=5).batch_size == 400
    with pytest.raises(
        ValueError, match="toy with up to 40 clusters a head needs batches of at least 80 images; got 64"
    ):
        one(n=2000, n_clusters=40, batch_size=64)


def test_of_few_images_fewer_overclusters_are_asked_unless_the_user_did(toy):
    assert one(n=160).params["overcluster"] == 2
    assert one(n=160).batch_size == 40
    assert one(n=60).params["overcluster"] == 1
    assert one(n=60).batch_size == 20
    assert one(n=2000, n_clusters=40).params["overcluster"] == 3
    assert one(n=2000, batch_size=40).params["overcluster"] == 2
    for asked in ({"overcluster": 5}, {"params": {"overcluster": 5}}, {"params": {"toy.overcluster": 5}}):
        with pytest.raises(ValueError, match="needs batches of at least 100 images; got 20 of 60"):
            one(n=60, **asked)
    with pytest.raises(ValueError, match="needs batches of at least 100 images; got 20 of 60"):
        one(n=60, n_clusters=50)


def test_the_stages_of_a_plan_share_the_time_of_one(toy):
    alone = one(n=1250).epochs
    both = resolve(Settings(method="toy+toy"), 1250, (1, 16, 16), CPU).stages
    assert alone == round(plan.EPOCHS * 2.0 * 2)
    assert [s.epochs for s in both] == [round(plan.EPOCHS * TOGETHER / 2 * 2)] * 2


@pytest.mark.parametrize("method", ["toy", "simclr+toy"])
def test_a_method_that_continues_needs_clusters_to_go_on_with(toy, method):
    with pytest.raises(ValueError, match="let one come right before it"):
        check(Settings(method=method, params={"width": 1}))
    check(Settings(method="sela+toy", params={"width": 1}))


@pytest.mark.parametrize(("n", "k"), [(300, 80), (1797, 190), (5000, 1000), (60_000, 1000), (120, 60)])
def test_the_default_plan_takes_many_clusters_with_batches_of_a_usual_size(n, k):
    made = resolve(Settings(n_clusters=k), n, (1, 16, 16), CPU)
    assert all(stage.batch_size <= 512 for stage in made.stages)
    assert "iic" not in [stage.method for stage in made.stages]
    assert resolve(Settings(), n, (1, 16, 16), CPU).stages[0].method == "iic"


def test_a_batch_is_not_raised_to_most_of_the_images():
    with pytest.raises(ValueError, match="needs batches of at least 4500"):
        resolve(Settings(method="iic", n_clusters=300, overcluster=1), 10_000, (1, 16, 16), CPU)


@pytest.mark.parametrize("over", [1, 3])
def test_the_users_overcluster_wins_over_the_papers(over):
    made = resolve(Settings(method="iic", preset="paper", overcluster=over), 2000, (1, 16, 16), CPU)
    assert made.stages[0].params["overcluster"] == over


def test_a_papers_batch_is_as_large_as_the_number_of_clusters_needs():
    made = resolve(Settings(method="simclr+scan", preset="paper", n_clusters=50), 10_000, (3, 32, 32), CPU)
    assert [s.batch_size for s in made.stages] == [1024, 200]


@pytest.mark.parametrize("damage", ["[]", "{}", '{"data": 1}', "{", "[" * 100_000])
def test_a_damaged_run_is_no_start(tmp_path, damage):
    (tmp_path / "config.json").write_text(damage)
    with pytest.raises(ValueError, match=r"config.json: it is damaged; give --init-from another run"):
        resolve(Settings(method="sela", init_from=str(tmp_path)), 100, (1, 16, 16), CPU)


def test_a_run_that_learnt_from_labels_is_no_start_for_one_without(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"data": {"use_labels": True}}))
    with pytest.raises(ValueError, match=r"learnt from labels .* give --init-from a run without them"):
        resolve(Settings(method="sela", init_from=str(tmp_path)), 100, (1, 16, 16), CPU)


@pytest.mark.parametrize(
    ("method", "key", "value"),
    [("swav", "temperature", 0), ("swav", "epsilon", 0), ("simclr", "temperature", 0.0), ("pcl", "alpha", 0),
     ("selflabel", "least", 2), ("fixmatch", "threshold", 1.5)],
)  # fmt: skip
def test_what_divides_is_above_0_and_a_share_at_most_1(method, key, value):
    with pytest.raises(ValueError, match=f"{method}: {key} must be (above 0|at most 1)"):
        make_recipe(method, **{key: value})
