"""A folder of pictures, clustered, looked at, corrected, and new pictures put in their place."""

# %% [markdown]
# # First clusters of your folder
#
# You have a folder of pictures and no labels, and want to know what is in it. This notebook sorts such a folder into
# clusters, looks at them, corrects them, and puts new pictures in their place.
#
# The folder here is made of scikit-learn's handwritten digits, so that the notebook runs anywhere in under a minute.
# With your own pictures, leave the second cell out and put your folder's name where it says `"photos"`.

# %%
import os
import tempfile
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from deepcluster import DeepCluster

os.chdir(tempfile.mkdtemp())  # everything below is written to a temporary folder

# %% [markdown]
# ## The pictures
#
# 1,500 PNG files to learn from, and 297 to be kept for the end. The file names are mere numbers: nothing tells which
# digit a picture shows.

# %%
# Some of the pictures in the folder
for i, pixels in enumerate(load_digits().images):
    folder = Path("photos" if i < 1500 else "new")
    folder.mkdir(exist_ok=True)
    Image.fromarray((pixels * 255 / 16).astype(np.uint8)).resize((32, 32)).save(folder / f"{i:04d}.png")


def show(rows, names=(), title=""):
    """Rows of paths as one picture, each row with its name; None leaves a gap."""
    sheet = np.zeros((34 * len(rows), 34 * max(map(len, rows))), np.uint8)
    for r, row in enumerate(rows):
        for c, path in enumerate(row):
            if path:
                sheet[34 * r + 1 : 34 * r + 33, 34 * c + 1 : 34 * c + 33] = Image.open(path)
    plt.figure(figsize=(sheet.shape[1] / 58, sheet.shape[0] / 58), dpi=80)
    plt.imshow(sheet, cmap="gray_r")
    plt.yticks(34 * np.arange(len(names)) + 17, names)
    plt.xticks([])
    plt.tick_params(length=0)
    plt.gca().spines[:].set_visible(False)
    plt.title(title, fontsize=11)
    plt.show()


files = sorted(Path("photos").iterdir())
show([files[i : i + 16] for i in range(0, 64, 16)], title="64 of the 1,500 pictures")

# %% [markdown]
# ## Fit
#
# You say how many clusters you want and where the run is to be kept. `method="uic"` is the quickest method; leave it
# out and the default is used, which takes longer and is usually better.

# %%
model = DeepCluster(n_clusters=10, method="uic", out="runs/photos").fit("photos")
print(f"{len(model.labels_)} pictures, trained for {model.seconds_:.0f} s; not readable: {len(model.skipped_)}")

# %% [markdown]
# `names_` are the files and `labels_` their clusters, in the same order. Clusters are numbered by size: 0 is the
# largest.

# %%
for name, label in zip(model.names_[:5], model.labels_[:5], strict=True):
    print(name, label)
print("sizes", np.bincount(model.labels_).tolist())

# %% [markdown]
# ## Look
#
# A cluster is known by its pictures. On the left are those most typical of each cluster, on the right the ones it is
# least sure of: most mistakes are there, and two kinds in one cluster show there first.

# %%
# Typical and doubtful pictures of each cluster
images = model.image_info().to_pylist()
clusters = model.cluster_info().to_pylist()
rows = []
for one in clusters:
    doubtful = sorted((row for row in images if row["cluster"] == one["id"]), key=lambda row: row["margin"])
    rows.append([*one["representatives"], None, *[row["path"] for row in doubtful[:6]]])
show(rows, [f"cluster {one['id']}" for one in clusters], "nine typical pictures, then the six most doubtful")

# %% [markdown]
# `cluster_info()` says the same in numbers. *Cohesion* is how alike the members are (1: equal), *separation* how far
# the nearest other cluster is (0: in the same place). A cluster with low values of both deserves a look.

# %%
print("id  size  cohesion  separation")
for one in clusters:
    print(f"{one['id']:2}  {one['size']:4}  {one['cohesion']:8.2f}  {one['separation']:10.2f}")

# %% [markdown]
# `image_info()` has a row for each picture: how probable its cluster is, which one comes second, whether it lies far
# from all others (`is_outlier`), and more. It is a table of pyarrow; `.to_pandas()` turns it into a data frame.

# %%
for row in sorted(images, key=lambda row: row["margin"])[:5]:
    print(f"{row['path']}: cluster {row['cluster']} ({row['probability']:.2f}), or else {row['second']}")
print(sum(row["is_outlier"] for row in images), "outliers")

# %% [markdown]
# ## Name and merge
#
# Names are yours to give, after a look at the pictures. So that this notebook needs nobody to look, the label of the
# most typical picture of each cluster takes the part of your eyes; it is the only place where labels are read.

# %%
labels = load_digits().target
model.set_cluster_names({one["id"]: f"digit {labels[int(Path(one['representatives'][0]).stem)]}" for one in clusters})
for one in model.cluster_info().to_pylist():
    print(f"cluster {one['id']}: {one['name']}")

# %% [markdown]
# Two clusters that show the same thing can be made one. Candidates are those that pictures hesitate between most
# often. The merged cluster keeps the smaller number, and no other picture moves. `undo()` takes the last change back;
# every change is kept in the run, so this also works next week.

# %%
pairs = Counter(tuple(sorted((row["cluster"], row["second"]))) for row in images if row["margin"] < 0.5)
(a, b), times = pairs.most_common(1)[0]
model.merge_clusters([[a, b]])
print(f"{times} pictures hesitate between {a} and {b}; as one, they have {np.sum(model.labels_ == a)} pictures")
model.undo()
print(f"taken back: {np.sum(model.labels_ == a)} and {np.sum(model.labels_ == b)}")

# %% [markdown]
# ## New pictures
#
# `predict` takes a folder too, or a file, or an array. These 297 were not used in training. Each row shows up to 16
# that were put in one cluster. `transform` gives their features, `predict_proba` the probability of every cluster.

# %%
# New pictures, a row for each cluster they were put in
found = model.predict("new")
new = np.array(sorted(Path("new").iterdir()))
called = model.classifier_.names
used = np.unique(found)
show([new[found == c][:16] for c in used], [f"{c}: {called[c]}" for c in used], "new pictures, in their clusters")

# %% [markdown]
# ## What is kept
#
# The run is a folder. Open `report.html` in a browser: it has a card for each cluster, a map of all pictures to zoom
# and search, and lets you name and merge on the page. `deepcluster.load("runs/photos")` brings the model back.

# %%
for path in sorted(Path("runs/photos").rglob("*")):
    if path.is_file():
        print(f"{path.stat().st_size / 1000:7.0f} kB  {path}")
