"""What the pseudo-labels do from epoch to epoch."""

# %% [markdown]
# # A river of labels
#
# Deep clustering makes up its labels: the network's features are clustered, the clusters become labels, the network
# learns them, its features change, and they are clustered again. Do these labels settle, or do they move for ever?
# This notebook watches them from epoch to epoch, without knowing any true label.
#
# `fit` takes *hooks*: functions that are called with a report after every epoch. They may look at everything and
# change nothing.

# %%
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

from deepcluster import DeepCluster, metrics

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
COLOURS = ["#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#999999"]
pictures = (load_digits().images[:1200] * 255 / 16).astype(np.uint8)

# %% [markdown]
# ## Train, and write the labels down
#
# `deepcluster` makes labels by k-means before every epoch, and numbers the new clusters so that they overlap the old
# ones most. `report.state.targets.labels` has a row of labels for each head of the network; one head is enough here.
# The final clusters may be numbered otherwise, since they are sorted by size.

# %%
history = []


def remember(report):
    """The hook: the labels that were just learnt, and the loss."""
    history.append((report.state.targets.labels[0].numpy(force=True).copy(), report.loss))


model = DeepCluster(n_clusters=10, method="deepcluster", epochs=25, params={"n_heads": 1, "overcluster": 1})
model.fit(pictures, hooks=[remember])
labels = np.array([labels for labels, _ in history])  # (epochs, pictures)
print(f"{len(labels)} epochs, {labels.shape[1]} pictures, {model.seconds_:.0f} s")

# %% [markdown]
# ## The river
#
# Time flows from left to right. A block is a cluster, as high as it has pictures; a band is pictures that go from one
# cluster to another, in the colour of where they come from. The first labels are k-means of the features of a network
# that knows nothing yet.

# %%
# The river of labels from epoch to epoch


def river(ax, columns, names):
    """Draw how the pictures move between the labelings in ``columns``, (N,) ints below 10 each."""
    n, gap, wide = len(columns[0]), 0.012 * len(columns[0]), 0.08
    tops = []  # of each cluster in each column
    for x, column in enumerate(columns):
        sizes = np.bincount(column, minlength=10)
        tops.append(np.concatenate([[0], np.cumsum(sizes[:-1] + gap)]))
        ax.bar(np.full(10, x), sizes, 2 * wide, bottom=tops[-1], color=COLOURS)
    s = np.linspace(0, 1, 30)
    smooth = s * s * (3 - 2 * s)
    for x, (old, new) in enumerate(pairwise(columns)):
        leave, arrive = tops[x].copy(), tops[x + 1].copy()
        for a, b in np.ndindex(10, 10):
            if count := ((old == a) & (new == b)).sum():
                low = leave[a] + (arrive[b] - leave[a]) * smooth
                ax.fill_between(x + wide + s * (1 - 2 * wide), low, low + count, color=COLOURS[a], alpha=0.45, lw=0)
                leave[a] += count
                arrive[b] += count
    ax.set_xticks(range(len(columns)), names)
    ax.set(yticks=[], ylim=(n + 9 * gap, 0), xlabel="epoch")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


shown = [0, 1, 2, 3, 5, 8, 12, 16, 20, 24]
fig, ax = plt.subplots(figsize=(11, 6), layout="constrained")
river(ax, labels[shown], [e + 1 for e in shown])
plt.show()

# %% [markdown]
# ## How much still moves
#
# NMI compares the labels of an epoch with those of the epoch before: 1 if nothing moved. It says whether the labels
# are stable, *not* whether they are good: a run that put everything into one cluster would be stable too. So the
# number of clusters that are really used is shown beside it (the exponential of the entropy of their sizes: 10 if all
# are of one size).

# %%
# Stability, moves and used clusters from epoch to epoch
epochs = np.arange(1, len(labels) + 1)
same = [metrics.agreement(new, old) for old, new in pairwise(labels)]
moved = (labels[1:] != labels[:-1]).mean(1)
used = [metrics.health(column, 10)["effective"] for column in labels]
fig, axes = plt.subplots(1, 4, figsize=(11, 2.8), layout="constrained")
for ax, x, y, name, top in (
    (axes[0], epochs[1:], same, "NMI to the epoch before", 1),
    (axes[1], epochs[1:], moved, "share of pictures that moved", None),
    (axes[2], epochs, used, "clusters really used", 10.2),
    (axes[3], epochs, [loss for _, loss in history], "loss", None),
):
    ax.plot(x, y, color="#332288")
    ax.set(title=name, xlabel="epoch", ylim=(0, top))
plt.show()

# %% [markdown]
# ## Which pictures move
#
# Most pictures find their place early, and a few go on wandering. These few are the ones worth a look: they lie
# between two clusters, or belong in none.

# %%
# How often pictures move, and the pictures that move most and least
moves = (labels[1:] != labels[:-1]).sum(0)
settled = np.array([np.flatnonzero(np.append(True, column[1:] != column[:-1]))[-1] for column in labels.T])
order = np.argsort(-moves, kind="stable")


def sheet(rows):
    """40 pictures as one."""
    tiles = np.pad(pictures[rows[:40]], ((0, 0), (1, 1), (1, 1))).reshape(4, 10, 10, 10)
    return tiles.transpose(0, 2, 1, 3).reshape(40, 100)


fig, axes = plt.subplots(1, 3, figsize=(11, 2.6), width_ratios=[2, 3, 3], layout="constrained")
axes[0].bar(*np.unique(moves, return_counts=True), color="#332288")
axes[0].set(xlabel="moves of a picture", ylabel="pictures")
for ax, rows, name in ((axes[1], order, "move most"), (axes[2], order[::-1], "move least")):
    ax.imshow(sheet(rows), cmap="gray_r")
    ax.set_title(name)
    ax.axis("off")
plt.show()
last = int(np.median(settled)) + 1
print(f"{np.mean(moves == 0):.0%} never move; half of all have their last label from epoch {last} on")

# %% [markdown]
# Does a wanderer end up as a doubtful picture? The final model gives every picture a *margin*: how much more probable
# its cluster is than the second.

# %%
margin = model.image_info()["margin"].to_numpy()
for name, low, high in (("never moved", 0, 0), ("moved once or twice", 1, 2), ("moved more often", 3, 99)):
    some = (low <= moves) & (moves <= high)
    print(f"{name:20} {some.sum():4} pictures, {np.mean(margin[some] < 0.5):4.0%} with a margin below 0.5")
