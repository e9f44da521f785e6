"""Too many clusters, how alike they are, and where to stop merging them."""

# %% [markdown]
# # Choosing the number of clusters by eye
#
# How many kinds of pictures are there? A safe way to find out is to ask for too many clusters and to join those that
# show the same thing: two clusters are easily merged, a mixed one is hard to take apart. This notebook makes 30
# clusters, draws how alike they are, decides where to stop merging, and checks what was lost by it.
#
# The pictures are 1,500 handwritten digits. Their labels are read in the last section only; no decision depends on
# them.

# %%
import matplotlib.pyplot as plt
import numpy as np
from scipy.cluster.hierarchy import dendrogram, fcluster, leaves_list, linkage
from sklearn.datasets import load_digits
from sklearn.preprocessing import normalize

from deepcluster import DeepCluster, metrics

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
pictures = (load_digits().images[:1500] * 255 / 16).astype(np.uint8)

# %% [markdown]
# ## Too many clusters

# %%
model = DeepCluster(n_clusters=30, method="uic", epochs=40).fit(pictures)
first = model.labels_.copy()
print("sizes", np.bincount(first).tolist())

# %% [markdown]
# ## A tree of clusters
#
# The mean of the features of its pictures says where a cluster lies. The tree joins the two nearest clusters, then
# the next two, and so on; the height of a fork is how far apart its two sides are. Under each leaf are pictures from
# the middle of that cluster.

# %%
# A tree of the 30 clusters, with pictures under each leaf
features = normalize(model.embedding_)
ids = np.unique(first)
centres = normalize([features[first == c].mean(0) for c in ids])
tree = linkage(centres, method="average", metric="cosine")
inside = [np.flatnonzero(first == c) for c in ids]
best = [np.resize(np.argsort(-features[rows] @ centre), 5) for rows, centre in zip(inside, centres, strict=True)]
middle = [rows[five] for rows, five in zip(inside, best, strict=True)]  # the same again where there are fewer


def strip(rows, axis=1):
    """Pictures side by side, or with axis=0 below each other."""
    return np.concatenate([np.pad(pictures[row], 1) for row in rows], axis)


fig, (top, bottom) = plt.subplots(2, figsize=(11, 5.6), height_ratios=[3, 2], layout="constrained")
dendrogram(tree, ax=top, color_threshold=0, above_threshold_color="#332288", no_labels=True)
top.set_ylabel("distance of the two sides")
top.spines["bottom"].set_visible(False)
leaves = leaves_list(tree)
bottom.imshow(np.hstack([strip(middle[leaf], axis=0) for leaf in leaves]), cmap="gray_r", aspect="auto")
bottom.set_xticks(10 * np.arange(len(ids)) + 4.5, ids[leaves])
bottom.set(yticks=[], xlabel="cluster")
bottom.spines[:].set_visible(False)
bottom.tick_params(length=0)
plt.show()

# %% [markdown]
# ## Where to stop
#
# From the bottom up, the first forks join what lies close together. The further up, the more a merge costs, and a
# step in the curve is a hint where to stop: on its right side everything cheap has been merged.
#
# The curve gives hints, your eyes decide. Each row below is one merge, the cheapest at the top: five pictures from
# each side. Go down as long as both sides show what you would call the same.

# %%
# What each merge costs, and pictures of what it joins
n = len(ids)
parts = {i: [i] for i in range(n)}  # of each node of the tree, the clusters below it
for i, (a, b, *_) in enumerate(tree.astype(int)):
    parts[n + i] = parts[a] + parts[b]


def five(node):
    """Five pictures from the middles of the clusters below a node, from all of them if possible."""
    return np.array([middle[leaf] for leaf in parts[node]]).T.ravel()[:5]


left = np.arange(n - 1, 0, -1)  # clusters left after each merge
fig, (curve, sheet) = plt.subplots(1, 2, figsize=(11, 5), width_ratios=[3, 2], layout="constrained")
curve.plot(left, tree[:, 2], "o-", color="#332288", markersize=4)
curve.set(xlabel="clusters left after the merge", ylabel="distance of what was merged", ylim=0, xticks=range(0, 31, 2))
curve.grid(axis="x", color="#dddddd")
shown = [i for i in range(n - 1) if 6 <= left[i] <= 19]
gap = np.zeros((10, 20), np.uint8)
rows = [np.hstack([strip(five(int(tree[i, 0]))), gap, strip(five(int(tree[i, 1])))]) for i in shown]
sheet.imshow(np.vstack(rows), cmap="gray_r")
sheet.set_yticks(10 * np.arange(len(shown)) + 4.5, [f"{left[i]} left" for i in shown])
sheet.set(xticks=[24.5, 94.5], xticklabels=["one side", "the other"])
sheet.spines[:].set_visible(False)
sheet.tick_params(length=0)
plt.show()

# %% [markdown]
# In the run shown here, the merges down to `12 left` join like with like, but for a 9 among the 7s; the next ones
# join different digits, and two kinds of 1. So the choice is 12. Another machine may make slightly different
# clusters: look, and change the number.

# %%
K = 12
groups = fcluster(tree, K, criterion="maxclust")
model.merge_clusters([ids[groups == g].tolist() for g in np.unique(groups) if (groups == g).sum() > 1])
print("sizes", {c: int((model.labels_ == c).sum()) for c in np.unique(model.labels_).tolist()})

# %% [markdown]
# A merged cluster keeps the smallest number of its parts, so there are holes in the numbering. A merge you do not
# agree with is simply left out of the list, and `model.undo()` takes the whole step back. Here is what became one, up
# to four of its parts with four pictures each:

# %%
# The merged clusters, with pictures of their parts
kept = np.unique(model.labels_)
sheet = np.zeros((10 * len(kept), 10 * 19), np.uint8)
for r, c in enumerate(kept):
    merged = [i for i in range(n) if groups[i] == groups[np.searchsorted(ids, c)]]
    for part, i in enumerate(merged[:4]):
        some = strip(middle[i][:4])
        sheet[10 * r : 10 * r + 10, 50 * part : 50 * part + some.shape[1]] = some
fig, ax = plt.subplots(figsize=(8, 5.2), layout="constrained")
ax.imshow(sheet, cmap="gray_r")
ax.set_yticks(10 * np.arange(len(kept)) + 4.5, [f"cluster {c}" for c in kept])
ax.set_xticks([])
ax.spines[:].set_visible(False)
ax.tick_params(length=0)
plt.show()

# %% [markdown]
# ## Ask for that many at once, and compare
#
# Another model is asked for 12 clusters from the start. A cluster that both ways find is there to be found; one that
# only one of them has is a matter of taste, or of luck. In the table, a dark field that is alone in its row and its
# column is a cluster on which they agree; two dark fields in a column are clusters that the direct run has put
# together.

# %%
# Merged clusters against clusters that were asked for directly
direct = DeepCluster(n_clusters=K, method="uic", epochs=40).fit(pictures).labels_
table = metrics.contingency(model.labels_, direct)
table = table[:, np.argsort(table.argmax(0), kind="stable")]
fig, ax = plt.subplots(figsize=(6, 4.6), layout="constrained")
picture = ax.imshow(table / table.sum(1, keepdims=True), cmap="Blues", vmin=0, vmax=1)
fig.colorbar(picture, label="share of the merged cluster")
ax.set(xlabel="clusters of the direct run", ylabel="merged cluster", xticks=[])
ax.set_yticks(range(len(kept)), kept)
plt.show()
nmi, ari = metrics.nmi(model.labels_, direct), metrics.ari(model.labels_, direct)
print(f"agreement: NMI {nmi:.2f}, adjusted Rand index {ari:.2f}")

# %% [markdown]
# ## A last remark, with labels
#
# Had we known the labels: purity is the share of pictures that are of the most frequent digit of their cluster.
# Merging can only lower it, and it falls where different digits are joined. NMI also counts against splitting a digit
# in two. There is no right answer in them for your pictures: two ways to write a 1 are one digit, but they are two
# kinds of pictures.

# %%
# Purity and NMI along the tree
digits = load_digits().target[:1500]
cuts = range(2, n + 1)
found = [fcluster(tree, k, criterion="maxclust")[np.searchsorted(ids, first)] for k in cuts]
fig, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
ax.plot(cuts, [metrics.purity(labels, digits) for labels in found], "o-", color="#332288", markersize=4, label="purity")
ax.plot(cuts, [metrics.nmi(labels, digits) for labels in found], "s-", color="#CC6677", markersize=4, label="NMI")
ax.axvline(K, color="#777777", linestyle="--", label=f"chosen: {K}")
ax.set(xlabel="clusters", ylabel="against the labels", ylim=(0, 1))
ax.legend(frameon=False)
plt.show()
