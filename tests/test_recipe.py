"""The words a method is written in: clocks, cadences, registration, and what a misspelling is answered with."""

from itertools import pairwise

import pytest
import torch

import deepcluster.methods  # noqa: F401
from deepcluster import recipe as module
from deepcluster.assign import Aligned, Balanced, KMeans, centroid_heads
from deepcluster.losses import contrastive, mutual_information, pseudo_label
from deepcluster.recipe import (
    METHODS,
    Clock,
    Every,
    Never,
    Recipe,
    Spread,
    Targets,
    hint,
    keep_heads,
    make_recipe,
    method,
    once,
    reset_heads,
)


def test_the_clock_runs_from_zero_to_just_below_one():
    assert Clock(0, 10).progress == 0
    assert Clock(5, 10).progress == 0.5
    assert Clock(9, 10, 3, 4).progress == pytest.approx(0.975)


@pytest.mark.parametrize(
    ("cadence", "due"),
    [
        (Every(), [0, 1, 2, 3, 4, 5]),
        (Every(2), [0, 2, 4]),
        (Never(), []),
        (once, [0]),
        (Spread(3), [0, 2]),  # 6 (i / 3)^2 = 0, 0.67, 2.67
        (Spread(3, power=1), [0, 2, 4]),
        (Spread(1), [0]),
        (Spread(100), [0, 1, 2, 3, 4, 5]),
    ],
    ids=repr,
)
def test_cadences(cadence, due):
    assert [e for e in range(6) if cadence.due(Clock(e, 6))] == due


def test_spread_is_dense_at_first_and_falls_on_epochs_that_exist():
    due = [e for e in range(400) if Spread(100).due(Clock(e, 400))]
    gaps = [b - a for a, b in pairwise(due)]
    assert due[0] == 0
    assert due[-1] == int(400 * 0.99**2)
    assert gaps[:5] == [1] * 5
    assert gaps[-1] == 8


def test_unlabelled_targets_pair_every_image_with_itself():
    targets = Targets.unlabelled(2, 3)
    assert targets.labels.tolist() == [[-1] * 3] * 2
    assert targets.labels.dtype == torch.int32
    assert targets.partners.tolist() == [[0], [1], [2]]


# --- the registry ---


def test_the_methods_are_registered():
    assert set(METHODS) >= {"deepcluster", "iic", "sela", "simclr"}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_can_be_made_with_and_without_arguments(name):
    default, small = make_recipe(name), make_recipe(name, n_clusters=4)
    assert default == make_recipe(name)  # a recipe is a value
    if not small.pretext:
        assert small.heads[0] == 4
    assert len(small.heads) >= 1
    assert small.passes > 0


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_names_its_paper(name):
    assert "arXiv:" in __import__(METHODS[name].__module__, fromlist=["x"]).__doc__


@pytest.mark.parametrize("name", ["deepcluster", "iic", "sela"])
def test_overclustering_can_be_left_out(name):
    assert set(make_recipe(name, n_clusters=4, overcluster=1).heads) == {4}
    assert set(make_recipe(name, n_clusters=4, overcluster=3).heads) == {4, 12}


@pytest.mark.parametrize(
    ("heads", "assigner", "warm", "policy"),
    [
        ("match", Aligned, False, keep_heads),
        ("keep", KMeans, True, keep_heads),
        ("reset", KMeans, False, reset_heads),
        ("centroids", KMeans, False, centroid_heads),
    ],
)
def test_deepcluster_and_what_its_heads_keep(heads, assigner, warm, policy):
    recipe = make_recipe("deepcluster", n_clusters=4, overcluster=3, pca_dim=7, every=2, heads=heads, n_heads=2)
    assert isinstance(recipe.assigner, assigner)
    kmeans = recipe.assigner.inner if heads == "match" else recipe.assigner
    assert (kmeans.pca_dim, kmeans.warm) == (7, warm)
    assert recipe.reassign is policy
    assert recipe.refresh == Every(2)
    assert recipe.balanced
    assert recipe.heads == (4, 4, 12)
    assert recipe.rivals == [0, 1]


def test_iic_pairs_the_image_with_each_of_its_augmentations():
    recipe = make_recipe("iic", n_clusters=4, overcluster=5, sub_heads=2, repeats=3, marginal_weight=1.5)
    assert recipe.views == ("clean", "strong", "strong", "strong")
    assert recipe.heads == (4, 4, 20, 20)
    z = torch.randn(4, 30, 5, generator=torch.Generator().manual_seed(0))
    p = z.softmax(-1)
    pairs = [mutual_information(p[0], p[v], marginal_weight=1.5) for v in (1, 2, 3)]
    torch.testing.assert_close(recipe.objectives[0](z, torch.zeros(30), Clock(0, 1)), sum(pairs) / 3)


def test_sela_refreshes_over_the_run_from_several_views():
    recipe = make_recipe("sela", n_clusters=4, overcluster=5, n_heads=2, refreshes=7, strength=25, label_views=3)
    assert recipe.assigner == Balanced(25)
    assert recipe.refresh == Spread(7)
    assert len(recipe.label_views) == 3
    assert recipe.heads == (4, 4, 20, 20)


def test_simclr_contrasts_two_views_and_has_to_be_followed():
    recipe = make_recipe("simclr", temperature=0.2, projection=8)
    z = torch.nn.functional.normalize(torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    found = recipe.objective(z, torch.zeros(6), Clock(0, 1))
    torch.testing.assert_close(found, contrastive(z[0], z[1], temperature=0.2))
    assert recipe.pretext
    assert recipe.heads == (8,)
    assert len(recipe.views) == 2


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(module, "METHODS", {})


@pytest.mark.usefixtures("registry")
def test_a_method_is_a_function_and_its_arguments_are_its_configuration():
    @method
    def mine(n_clusters: int = 10, weight: float = 1.0, name: str = "a", flag: bool = False) -> Recipe:
        return Recipe((n_clusters,), pseudo_label, passes=weight, pretext=flag)

    assert make_recipe("mine", n_clusters=7, weight=2, flag=True) == Recipe((7,), pseudo_label, passes=2, pretext=True)
    for wrong, message in [
        ({"n_clusters": 2.5}, r"mine: n_clusters must be int \(default 10\); got 2.5"),
        ({"n_clusters": True}, r"mine: n_clusters must be int \(default 10\); got True"),
        ({"n_clusters": "7"}, r"mine: n_clusters must be int \(default 10\); got '7'"),
        ({"weight": "1"}, r"mine: weight must be float \(default 1.0\); got '1'"),
        ({"weight": False}, r"mine: weight must be float \(default 1.0\); got False"),
        ({"weight": None}, r"mine: weight must be float \(default 1.0\); got None"),
        ({"name": 3}, r"mine: name must be str \(default 'a'\); got 3"),
        ({"flag": 1}, r"mine: flag must be bool \(default False\); got 1"),
        ({"wieght": 1.0}, "mine has no parameter 'wieght'; did you mean 'weight'?"),
        ({"zzz": 1.0}, "mine has no parameter 'zzz'; choose from flag, n_clusters, name, weight"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_recipe("mine", **wrong)


@pytest.mark.usefixtures("registry")
def test_two_methods_of_one_name_are_refused():
    def mine(n_clusters: int = 10) -> Recipe:
        raise NotImplementedError

    method(mine)
    with pytest.raises(ValueError, match=r"method 'mine' is already registered by test_recipe"):
        method(mine)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_recipe("deepclutser"), "unknown method 'deepclutser'; did you mean 'deepcluster'"),
        (lambda: make_recipe("xyzzy"), "unknown method 'xyzzy'; choose from .*deepcluster, .*iic"),
        (lambda: make_recipe("iic", overclutser=3), "iic has no parameter 'overclutser'; did you mean 'overcluster'"),
        (lambda: make_recipe("deepcluster", heads="rest"), "unknown heads 'rest'; did you mean 'reset'"),
    ],
)
def test_misspelling_is_answered_with_the_right_word(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_hints():
    assert hint("kat", ["cat", "dog"]) == "did you mean 'cat'?"
    assert hint("quux", {"dog": 1, "cat": 2}) == "choose from cat, dog"


def test_an_assigner_without_a_refresh_is_refused_and_the_reverse():
    def assigner(features, heads, previous, seed):
        return previous

    with pytest.raises(ValueError, match="assigner and refresh go together"):
        Recipe((3,), pseudo_label, assigner=assigner)
    with pytest.raises(ValueError, match="assigner and refresh go together"):
        Recipe((3,), pseudo_label, refresh=Every(1))


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("iic", {"n_clusters": 1}, "n_clusters must be at least 2"),
        ("deepcluster", {"every": 0}, "every must be at least 1"),
        ("sela", {"refreshes": -3}, "refreshes must be at least 1"),
        ("simclr", {"temperature": -0.1}, "temperature must be at least 0"),
        ("simclr", {"temperature": float("inf")}, "temperature must be at least 0"),
    ],
)
def test_a_number_out_of_range_is_refused(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_recipe(name, **kwargs)
