"""Scores against the published vectors, scikit-learn and the textbook."""

import time
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score

from deepcluster import metrics

TRUE, PRED = [0, 0, 0, 1, 1, 2], [1, 1, 0, 0, 0, 2]
OVER_TRUE, OVER_PRED = [0] * 4 + [1] * 4, [0, 0, 1, 1, 2, 2, 3, 3]
TWO_SIDED = [
    metrics.accuracy,
    metrics.purity,
    metrics.nmi,
    metrics.ari,
    metrics.ami,
    metrics.contingency,
    metrics.agreement,
]


def naive_accuracy(pred, true):
    """Every one-to-one naming of clusters by classes, tried; -1 is never named."""
    clusters, names = sorted(set(pred) - {-1}), sorted(set(true))
    names += ["no class"] * len(clusters)
    return max(
        sum(dict(zip(clusters, named, strict=True)).get(p) == t for p, t in zip(pred, true, strict=True))
        for named in permutations(names, len(clusters))
    ) / len(true)


def naive_ari(pred, true):
    """Pair by pair."""
    pairs = [(pred[i] == pred[j], true[i] == true[j]) for i in range(len(pred)) for j in range(i)]
    both, a, b = sum(p and t for p, t in pairs), sum(p for p, _ in pairs), sum(t for _, t in pairs)
    chance, most = a * b / max(len(pairs), 1), (a + b) / 2
    return (both - chance) / (most - chance) if most != chance else 1.0


def test_the_vector_of_the_specification():
    assert metrics.contingency(PRED, TRUE).tolist() == [[1, 2, 0], [2, 0, 0], [0, 0, 1]]
    assert metrics.contingency(PRED, TRUE).dtype == np.int64
    found = metrics.scores(PRED, TRUE, n_clusters=4)
    assert found == {
        "acc": pytest.approx(5 / 6),
        "nmi": pytest.approx(0.685331, abs=1e-6),
        "nmi_geometric": pytest.approx(normalized_mutual_info_score(TRUE, PRED, average_method="geometric")),
        "ari": pytest.approx(0.318182, abs=1e-6),
        "ami": pytest.approx(0.411828, abs=1e-6),
        "purity": pytest.approx(5 / 6),
        "n_found": 3,
        "n_clusters": 4,
        "n_images": 6,
    }


def test_overclustering_parts_accuracy_from_purity_and_the_two_averages():
    assert metrics.accuracy(OVER_PRED, OVER_TRUE) == 0.5
    assert metrics.purity(OVER_PRED, OVER_TRUE) == 1.0
    assert metrics.nmi(OVER_PRED, OVER_TRUE) == pytest.approx(0.666667, abs=1e-6)
    assert metrics.nmi(OVER_PRED, OVER_TRUE, average="geometric") == pytest.approx(0.707107, abs=1e-6)


def test_fewer_clusters_than_classes():
    assert metrics.accuracy([0, 0, 0, 0], [0, 0, 1, 2]) == 0.5
    assert metrics.purity([0, 0, 0, 0], [0, 0, 1, 2]) == 0.5


def test_a_permuted_labeling_agrees_fully_and_a_constant_one_not_at_all():
    for score in (metrics.nmi, metrics.ari, metrics.ami, metrics.accuracy, metrics.agreement):
        assert score([2, 2, 0, 0, 1], [0, 0, 1, 1, 2]) == 1.0
    for average in ("arithmetic", "geometric"):
        assert metrics.nmi([7] * 5, [0, 0, 1, 1, 2], average) == 0.0
        assert metrics.nmi([7] * 5, [3] * 5, average) == 1.0


@pytest.mark.parametrize("labels", [[0], [0, 0, 0], [0, 1, 2, 3]], ids=["one image", "constant", "singletons"])
def test_degenerate_labelings_equal_themselves(labels):
    for score in (metrics.nmi, metrics.ari, metrics.ami, metrics.accuracy, metrics.purity):
        assert score(labels, labels) == 1.0


def test_unassigned_images_are_wrong_in_accuracy_and_a_group_elsewhere():
    pred, true = [0, 0, -1, -1, -1, 1], [0, 0, 1, 1, 1, 2]
    assert metrics.accuracy(pred, true) == 0.5
    assert metrics.accuracy([-1, -1], [0, 1]) == 0.0
    assert metrics.purity(pred, true) == metrics.nmi(pred, true) == 1.0
    assert metrics.contingency(pred, true)[0].tolist() == [0, 3, 0]
    assert metrics.scores(pred, true, 3)["n_found"] == 2


@pytest.mark.parametrize(
    "kind",
    [
        lambda x: np.array(x, dtype=np.uint8),
        lambda x: np.array(x, dtype=np.float32),
        lambda x: np.array(x) * 10**15 - 5,
        lambda x: [f"c{i}" for i in x],
        lambda x: np.array([None if i == 0 else f"c{i}" for i in x], dtype=object),
        lambda x: [i == 1 for i in x],
    ],
    ids=["uint8", "float", "huge", "str", "object", "bool"],
)
def test_labels_of_any_kind(kind):
    named = TRUE if len(set(kind(TRUE))) == 3 else [int(i == 1) for i in TRUE]
    assert metrics.scores(PRED, kind(TRUE), 3) == metrics.scores(PRED, named, 3)


def test_minus_one_among_objects_is_unassigned_too():
    assert metrics.accuracy(np.array(["a", -1, -1], dtype=object), [0, 1, 1]) == pytest.approx(1 / 3)


labelings = st.integers(1, 9).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(-1, 3), min_size=n, max_size=n), st.lists(st.integers(0, 3), min_size=n, max_size=n)
    )
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(labelings)
def test_every_score_is_the_textbooks(pair):
    pred, true = pair
    table = metrics.contingency(pred, true)
    assert table.tolist() == [
        [sum(p == k and t == c for p, t in zip(pred, true, strict=True)) for c in sorted(set(true))]
        for k in sorted(set(pred))
    ]
    assert metrics.accuracy(pred, true) == pytest.approx(naive_accuracy(pred, true))
    assert metrics.purity(pred, true) == pytest.approx(table.max(1).sum() / len(true))
    assert metrics.ari(pred, true) == pytest.approx(naive_ari(pred, true))
    assert metrics.ari(pred, true) == pytest.approx(adjusted_rand_score(true, pred))
    same = naive_ari(pred, true) == 1  # two equal labelings into singletons score 1 here, 0 in older scikit-learn
    assert metrics.ami(pred, true) == pytest.approx(1 if same else adjusted_mutual_info_score(true, pred), abs=1e-9)
    for average in ("arithmetic", "geometric"):
        expected = normalized_mutual_info_score(true, pred, average_method=average)
        assert metrics.nmi(pred, true, average) == pytest.approx(expected, abs=1e-9)


def test_no_overflow_for_a_billion_images():
    counts = np.array([[5 * 10**8, 0], [0, 5 * 10**8]])
    assert metrics._ari(counts) == 1.0
    counts[0, 1], counts[0, 0] = 10**8, 4 * 10**8
    small = metrics._ari(counts // 10**5)
    assert metrics._ari(counts) == pytest.approx(small, abs=1e-3)


def test_a_million_images_in_a_thousand_clusters_are_quick_and_leave_ami_out():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 1000, 1_000_000)
    pred = np.where(rng.random(len(true)) < 0.6, true, rng.integers(0, 1000, len(true)))
    start = time.perf_counter()
    found = metrics.scores(pred, true, 1000)
    assert time.perf_counter() - start < 1.5  # 0.1 s on one idle core
    assert found["ami"] is None
    assert found["acc"] == found["purity"] == pytest.approx(0.6 + 0.4 / 1000, abs=2e-3)


def test_health_of_a_balanced_a_collapsed_and_an_empty_clustering():
    assert metrics.health([0, 1, 2, 3] * 5, 4) == {
        "active": 4, "largest_share": 0.25, "entropy": pytest.approx(np.log(4)), "effective": pytest.approx(4)
    }  # fmt: skip
    assert metrics.health([2] * 5, 4) == {"active": 1, "largest_share": 1.0, "entropy": 0.0, "effective": 1.0}
    assert metrics.health([-1, -1], 4) == {"active": 0, "largest_share": 0.0, "entropy": 0.0, "effective": 0.0}
    assert metrics.health([-1, -1, 0, 1], 4)["largest_share"] == 0.5


def test_sizes_count_assigned_images():
    assert metrics.sizes([0, 2, 2, -1]).tolist() == [1, 0, 2]
    assert metrics.sizes([0, 2, 2, -1], 5).tolist() == [1, 0, 2, 0, 0]
    assert metrics.sizes([], 2).tolist() == [0, 0]
    with pytest.raises(ValueError, match="below n_clusters=2; got 2"):
        metrics.sizes([0, 2], 2)


@pytest.mark.parametrize("score", TWO_SIDED, ids=lambda f: f.__name__)
def test_wrong_input_is_answered(score):
    with pytest.raises(ValueError, match="got 2 and 3 labels"):
        score([0, 1], [0, 1, 2])
    with pytest.raises(ValueError, match="empty"):
        score([], [])
    with pytest.raises(ValueError, match=r"one-dimensional; got shape \(2, 1\)"):
        score([[0], [1]], [0, 1])


def test_an_unknown_average_is_refused():
    with pytest.raises(ValueError, match="'arithmetic' or 'geometric'; got 'max'"):
        metrics.nmi([0, 1], [0, 1], average="max")
