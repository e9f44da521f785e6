"""Three methods and three seeds: how good, where wrong, and whether they agree."""

# %% [markdown]
# # Comparing methods
#
# Which method is best for your pictures? A single run with each does not tell: another seed can change more than
# another method does. This notebook runs three methods with three seeds each, and k-means on the pixels as a
# baseline, and looks at how good they are, where they err, and whether they agree.
#
# To be quick, it takes 1,000 digits of 8 x 8 pixels and 20 epochs, far less than the defaults. It shows how to
# compare; it is no ranking. Longer runs are in `docs/results.md`.

# %%
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from deepcluster import DeepCluster, metrics

plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})
METHODS, SEEDS = ("uic", "sela", "deepcluster"), (0, 1, 2)
COLOURS = {"k-means": "#999999", "uic": "#332288", "sela": "#CC6677", "deepcluster": "#117733"}
pictures = (load_digits().images[:1000] * 255 / 16).astype(np.uint8)

# %% [markdown]
# ## Run
#
# Every method gets the same pictures, size, number of clusters and epochs. None sees a label, and nothing is chosen:
# every run that was made is in the table.

# %%
pixels = pictures.reshape(len(pictures), -1)
runs = {("k-means", seed): KMeans(10, n_init=1, random_state=seed).fit_predict(pixels) for seed in SEEDS}
for method, seed in product(METHODS, SEEDS):
    model = DeepCluster(10, method=method, epochs=20, image_size=8, random_state=seed).fit(pictures)
    runs[method, seed] = model.labels_
print(len(runs), "runs")

# %% [markdown]
# ## Score
#
# Labels are read here for the first time. *ACC* is the share of pictures that are right when each cluster is given
# one digit in the best way; *NMI* and *ARI* need no such matching. With three runs a mean says little: here are the
# median and the range. Where the ranges of two methods overlap, three seeds have not told them apart.

# %%
# The accuracy of every run
digits = load_digits().target[: len(pictures)]
names = ["k-means", *METHODS]
scores = {name: [metrics.scores(runs[name, seed], digits, 10) for seed in SEEDS] for name in names}
print(f"{'':12}  {'ACC':18}  {'NMI':18}  {'ARI':18}")
for name in names:
    values = [[one[key] for one in scores[name]] for key in ("acc", "nmi", "ari")]
    print(f"{name:12}  " + "  ".join(f"{np.median(v):.3f} ({min(v):.3f}–{max(v):.3f})" for v in values))

fig, ax = plt.subplots(figsize=(7, 2.6), layout="constrained")
for row, name in enumerate(names):
    acc = [one["acc"] for one in scores[name]]
    ax.plot([min(acc), max(acc)], [row, row], color=COLOURS[name], lw=2)
    ax.plot(acc, [row] * len(acc), "o", color=COLOURS[name], markersize=9, alpha=0.7)
ax.set_yticks(range(len(names)), names)
ax.set(xlabel="ACC of each run", xlim=(0.5, 1), ylim=(len(names) - 0.5, -0.5))
ax.grid(axis="x", color="#dddddd")
plt.show()

# %% [markdown]
# ## Where they err
#
# The confusion matrices of the runs with seed 0, which was said before it was known how they end. A row is a digit, a
# column a cluster; the columns are put in the order in which most pictures lie on the diagonal. A row with two fields
# is a digit that was split, a column with two fields is two digits in one cluster.

# %%
# Digits against clusters, for each method


def matched(labels, reference):
    """The labels, renamed so that as many as possible equal the reference."""
    table = np.zeros((10, 10), int)
    np.add.at(table, (labels, reference), 1)
    return linear_sum_assignment(-table)[1][labels]


fig, axes = plt.subplots(1, len(names), figsize=(12, 3.5), sharey=True, layout="constrained")
for ax, name in zip(axes, names, strict=True):
    table = np.zeros((10, 10), int)
    np.add.at(table, (digits, matched(runs[name, 0], digits)), 1)
    ax.imshow(table, cmap="Blues", vmin=0, vmax=table.sum(1).max())
    for (row, column), count in np.ndenumerate(table):
        if count > 4:
            ax.text(column, row, count, ha="center", va="center", fontsize=8, color="white" if count > 50 else "black")
    ax.set(title=name, xlabel="cluster", xticks=[], yticks=range(10))
axes[0].set_ylabel("digit")
plt.show()

# %% [markdown]
# ## Do they agree?
#
# Without labels, agreement is all there is to see. NMI between two labelings is 1 if they are the same up to names.
# On the diagonal blocks are runs of one method with other seeds: a method that does not agree with itself has not
# found what is in the pictures. The converse does not hold: several runs may agree on the same mistake.

# %%
# A heat map of the NMI between all runs
keys = list(runs)
agreement = np.array([[metrics.nmi(runs[a], runs[b]) for b in keys] for a in keys])
fig, ax = plt.subplots(figsize=(6.4, 5.2), layout="constrained")
picture = ax.imshow(agreement, cmap="cividis", vmin=agreement.min(), vmax=1)
fig.colorbar(picture, label="NMI between two runs")
ticks = [f"{name} {seed}" for name, seed in keys]
ax.set_xticks(range(len(keys)), ticks, rotation=90)
ax.set_yticks(range(len(keys)), ticks)
for edge in np.arange(2.5, len(keys) - 1, 3):
    ax.axhline(edge, color="white", lw=2)
    ax.axvline(edge, color="white", lw=2)
ax.spines[:].set_visible(False)
ax.tick_params(length=0)
plt.show()
for a, b in (("uic", "sela"), ("uic", "deepcluster"), ("sela", "deepcluster")):
    values = [metrics.ari(runs[a, s], runs[b, t]) for s, t in product(SEEDS, SEEDS)]
    print(f"{a} and {b}: ARI {np.median(values):.2f} ({min(values):.2f}–{max(values):.2f})")

# %% [markdown]
# ## What they differ in
#
# Pictures on which all runs of the three methods agree, and pictures on which they are most divided. For this, the
# clusters of every run are renamed after those of the first; a picture's votes are the names it then has. No label is
# needed, so this works on your pictures too: the divided ones are those to look at by hand.

# %%
# Pictures that all runs agree on, and pictures they are divided about
votes = np.array([matched(runs[key], runs["uic", 0]) for key in keys if key[0] != "k-means"])
counts = np.array([np.bincount(column, minlength=10) for column in votes.T])
united = counts.max(1) / len(votes)  # the share of the runs that the most frequent name has
order = np.argsort(united, kind="stable")


def sheet(rows):
    """40 pictures as one."""
    tiles = np.pad(pictures[rows[:40]], ((0, 0), (1, 1), (1, 1))).reshape(4, 10, 10, 10)
    return tiles.transpose(0, 2, 1, 3).reshape(40, 100)


fig, axes = plt.subplots(1, 3, figsize=(11, 2.6), width_ratios=[2, 3, 3], layout="constrained")
axes[0].hist(united * len(votes), bins=np.arange(0.5, len(votes) + 1), color="#332288", rwidth=0.85)
axes[0].set(xlabel=f"runs of {len(votes)} that agree", ylabel="pictures")
for ax, rows, name in ((axes[1], order, "most divided"), (axes[2], order[::-1], "all agree")):
    ax.imshow(sheet(rows), cmap="gray_r")
    ax.set_title(name)
    ax.axis("off")
plt.show()

# %% [markdown]
# Does agreement mean anything? With labels we can tell: for pictures on which so many runs agree, the share whose
# most frequent name is right.

# %%
most = matched(counts.argmax(1), digits)
for low, high, name in ((1, 5, "up to 5 runs agree"), (6, 8, "6 to 8 runs agree"), (9, 9, "all runs agree")):
    some = (low <= counts.max(1)) & (counts.max(1) <= high)
    if some.any():
        print(f"{name:18}  {some.sum():4} pictures, {np.mean(most[some] == digits[some]):.0%} right")
