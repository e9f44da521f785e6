"""The tables of a run: representatives, cohesion, separation, and what an edit changes of them."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from deepcluster import results


def test_representatives_are_the_nearest():
    found = {"cluster": np.array([0] * 12 + [1]), "distance": np.r_[np.arange(12)[::-1] / 12, 0.5]}
    assert results.representatives(found).tolist() == [False] * 3 + [True] * 10


def test_representatives_where_ids_have_holes_and_rows_are_mixed():
    cluster = np.array([4, 1] * 15)
    distance = np.arange(30)[::-1] / 30
    chosen = results.representatives({"cluster": cluster, "distance": distance})
    assert chosen.tolist() == [False] * 12 + [True] * 18


def test_cohesion_and_separation_by_hand():
    found = {"cluster": np.array([0, 0, 2]), "distance": np.array([0.3, 0.1, 0.0])}
    centroids = torch.tensor([[2.0, 0], [9, 9], [3, 3]])
    classifier = SimpleNamespace(n_clusters=3, centroids=centroids, names=["a", "b", "c"], junk={2})
    first, second = results.clusters(found, ["x", "y", "z"], classifier).to_pylist()
    assert (first["id"], first["name"], first["size"], first["representatives"]) == (0, "a", 2, ["y", "x"])
    assert first["cohesion"] == pytest.approx(0.8)
    assert first["separation"] == second["separation"] == pytest.approx(1 - 2**-0.5, abs=1e-6)
    assert second["id"] == 2
    assert (first["is_junk"], second["is_junk"]) == (False, True)


def test_one_cluster_has_no_separation():
    found = {"cluster": np.array([1]), "distance": np.array([0.0])}
    classifier = SimpleNamespace(n_clusters=2, centroids=torch.eye(2), names=["", ""], junk=set())
    assert results.clusters(found, ["x"], classifier)["separation"].to_pylist() == [None]


def test_a_table_that_fails_half_way_leaves_the_old_one(tmp_path, monkeypatch):
    old = pa.table({"a": [1]})
    results.write_table(tmp_path / "t.parquet", old)

    def broken(table, file):
        file.write(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", broken)
    with pytest.raises(OSError, match="No space"):
        results.write_table(tmp_path / "t.parquet", pa.table({"a": [2]}))
    assert pq.read_table(tmp_path / "t.parquet").equals(old)
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]
