"""Features: exported, searched, drawn as a map, and probed with labels."""

# %% [markdown]
# # Features: search, map, and a classifier from few labels
#
# Besides clusters, a run leaves features: a vector for each picture, in which alike pictures lie close together. This
# notebook exports them, finds similar pictures with them, draws a map, and measures what they are worth to somebody
# who has labels for some of the pictures.
#
# 1,500 handwritten digits are trained on, without labels; 297 others are kept as new pictures.

# %%
import json
import os
import tempfile
from pathlib import Path

import faiss
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from deepcluster import DeepCluster
from deepcluster.export import export
from deepcluster.landscape import landscape
from deepcluster.probe import probes

os.chdir(tempfile.mkdtemp())  # everything below is written to a temporary folder
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
COLOURS = ["#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#999999"]
everything = (load_digits().images * 255 / 16).astype(np.uint8)
pictures, new = everything[:1500], everything[1500:]

# %%
model = DeepCluster(n_clusters=10, method="uic", epochs=40, out="runs/digits").fit(pictures)
print(f"trained for {model.seconds_:.0f} s")

# %% [markdown]
# ## Export
#
# `deepcluster export runs/digits --format npy --out features.npy` does the same on the command line. The array can be
# read by anything that knows NumPy; the list beside it has the file names in the same order. (Parquet, safetensors,
# ONNX, folders of images and TensorBoard's projector are other formats.)

# %%
print(export(Path("runs/digits"), "npy", Path("features.npy")))
features = np.load("features.npy")
names = json.loads(Path("features.names.json").read_text())
print(features.shape, features.dtype, names[:2])

# %% [markdown]
# ## Search
#
# faiss finds the nearest vectors. With vectors of length 1, the inner product is the cosine. The queries are new
# pictures, which the network has never seen; `transform` gives their features.


# %%
# New pictures, and the eight most similar of the old ones
def unit(rows):
    """Rows of length 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def strip(some):
    """Pictures side by side."""
    return np.hstack(np.pad(some, ((0, 0), (1, 1), (1, 1))))


index = faiss.IndexFlatIP(features.shape[1])
index.add(unit(features))
queries = unit(model.transform(new))
cosines, found = index.search(queries, 8)

shown = range(3, 283, 28)
gap = np.zeros((10, 6), np.uint8)
rows = [np.hstack([strip(new[[i]]), gap, strip(pictures[found[i]])]) for i in shown]
fig, ax = plt.subplots(figsize=(6, 6.2), layout="constrained")
ax.imshow(np.vstack(rows), cmap="gray_r")
ax.set_xticks([4.5, 55.5], ["new", "the nearest of 1,500, nearest first"])
ax.set_yticks(10 * np.arange(len(rows)) + 4.5, [f"{cosines[i, 0]:.2f}" for i in shown])
ax.set_ylabel("cosine to the nearest")
ax.spines[:].set_visible(False)
ax.tick_params(length=0)
plt.show()

# %% [markdown]
# A picture that is like none of the old ones shows by a low cosine. These are the new pictures whose nearest
# neighbour is farthest away:

# %%
# New pictures unlike all old ones
far = np.argsort(cosines[:, 0])[:12]
fig, ax = plt.subplots(figsize=(8, 1), layout="constrained")
ax.imshow(strip(new[far]), cmap="gray_r")
ax.set_xticks(10 * np.arange(len(far)) + 4.5, [f"{cosines[i, 0]:.2f}" for i in far])
ax.set_yticks([])
ax.spines[:].set_visible(False)
ax.tick_params(length=0)
plt.show()

# %% [markdown]
# ## A map
#
# `landscape` lays the pictures out in two dimensions, by t-SNE: neighbours in the features stay neighbours on the
# map. What is near is alike; how far apart two islands lie means little. The report of the run has this map to zoom
# and search.

# %%
# The map, coloured by cluster and with pictures
places = landscape(features).positions
fig, axes = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained")
for c in range(10):
    one = places[model.labels_ == c]
    axes[0].scatter(*one.T, s=6, color=COLOURS[c])
    middle = one[((one - np.median(one, 0)) ** 2).sum(1).argmin()]
    axes[0].text(*middle, c, ha="center", va="center", bbox={"fc": "white", "ec": "none", "pad": 1})
canvas = np.zeros((340, 340), np.uint8)
for (x, y), picture in zip(places, pictures, strict=True):
    spot = canvas[(top := int((1 - y) * 165)) : top + 8, (left := int((1 + x) * 165)) : left + 8]
    if not spot.any():  # the place is free
        spot[:] = picture
axes[1].imshow(canvas, cmap="gray_r", extent=(-1, 1, -1, 1))
for ax, name in zip(axes, ("clusters", "some of the pictures"), strict=True):
    ax.set(title=name, xticks=[], yticks=[], aspect="equal", xlim=(-1.05, 1.05), ylim=(-1.05, 1.05))
    ax.spines[:].set_visible(False)
plt.show()

# %% [markdown]
# ## What are the features worth?
#
# Now labels come in, for the first time. The usual measure is a *linear probe*: a linear classifier on the features,
# tested on a fifth of the images that it has not seen; *kNN* lets the nearest neighbours vote. The same on the bare
# pixels says what was gained. On the command line: `deepcluster evaluate RUN --probe linear,knn`.

# %%
labels = load_digits().target
for name, x in (("features", features), ("pixels", pictures.reshape(1500, -1))):
    result = probes(x, labels[:1500])
    print(f"{name:8}  linear {result['linear']['accuracy']:.3f}  kNN {result['knn']['accuracy']:.3f}")

# %% [markdown]
# Digits are so easy that pixels do well when there are 1,200 labels. The gain is where labels are few. Here a
# classifier gets 1 to 50 labelled pictures of each digit, ten different draws each, and is tested on the 297 new
# pictures, which neither it nor the network has seen.

# %%
# Accuracy on new pictures against the number of labels
rng = np.random.default_rng(0)
budgets = [1, 2, 5, 10, 20, 50]
of_digit = [np.flatnonzero(labels[:1500] == digit) for digit in range(10)]
old = {"features": features, "pixels": pictures.reshape(1500, -1)}
fresh = {"features": model.transform(new), "pixels": new.reshape(len(new), -1)}
reached = {name: np.zeros((len(budgets), 10)) for name in old}
for i, each in enumerate(budgets):
    for draw in range(10):
        some = np.concatenate([rng.choice(rows, each, replace=False) for rows in of_digit])
        for name, x in old.items():
            classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
            classifier.fit(x[some], labels[some])
            reached[name][i, draw] = classifier.score(fresh[name], labels[1500:])

fig, ax = plt.subplots(figsize=(7, 3.8), layout="constrained")
for (name, scores), colour, mark in zip(reached.items(), ("#332288", "#CC6677"), "os", strict=True):
    ax.fill_between(budgets, scores.min(1), scores.max(1), color=colour, alpha=0.2, lw=0)
    ax.plot(budgets, np.median(scores, 1), mark + "-", color=colour, label=name)
ax.set(xscale="log", xlabel="labelled pictures of each digit", ylabel="accuracy on new pictures", ylim=(0, 1))
ax.set_xticks(budgets, budgets)
ax.minorticks_off()
ax.legend(frameon=False, loc="lower right", title="median, and range of ten draws")
plt.show()
