"""Label files and scores."""

import numpy as np
import pytest

from deepcluster.evaluate import encode, read_labels, scores

NAMES = ["d/a.png", "d/b.png", "e/b.png", "e/c.png"]


def file(tmp_path, text):
    (tmp_path / "l.csv").write_text(text)
    return str(tmp_path / "l.csv")


@pytest.mark.parametrize(
    ("text", "found", "said"),
    [
        ("path,label\nd/a.png,x\nd/b.png,y\ne/b.png,x\ne/c.png,y\n", ["x", "y", "x", "y"], ""),
        ("label,path\nx,d/a.png\ny,d/b.png\nx,e/b.png\ny,e/c.png\n", ["x", "y", "x", "y"], ""),
        ("d/a.png,x\nd/b.png,y\ne/b.png,x\ne/c.png,y\n", ["x", "y", "x", "y"], ""),
        ("a.png,x\nc.png,y\n", ["x", None, None, "y"], "2 of 4 images have no label"),
        ("./d/a.png,x\n", ["x", None, None, None], "3 of 4"),
        ("b.png,x\na.png,y\n", ["y", None, None, None], "1 rows of"),  # two images end in b.png: it names neither
        ("path,label\nd/a.png,x\nzz.png,y\n", ["x", None, None, None], "1 rows of"),
    ],
)
def test_rows_find_their_images(tmp_path, text, found, said):
    got, warning = read_labels(file(tmp_path, text), NAMES)
    assert got == found
    assert said in warning
    assert bool(said) == bool(warning)


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "columns path,label"), ("path\nd/a.png\n", "columns path,label"), ("q,x\n", "none of the 4")],
)
def test_wrong_files(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        read_labels(file(tmp_path, text), NAMES)


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match="no label file"):
        read_labels(str(tmp_path / "none.csv"), NAMES)


def test_encode():
    assert encode(["b", None, "a", "b"]).tolist() == [1, -1, 0, 1]
    assert encode([None, None]) is None
    assert encode(None) is None


def test_images_without_a_class_are_left_out():
    found = scores(np.array([0, 0, 1, 1, 0]), np.array([5, 5, 7, 7, -1]), 2)
    assert found["acc"] == found["nmi"] == found["ari"] == 1
    assert found["n_images"] == 4
    assert found["n_clusters"] == 2
    assert scores(np.array([0, 1]), np.array([3, -1]), 2)["n_images"] == 1
