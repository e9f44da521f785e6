"""How often ``deepcluster k`` counts right: made sets, noise, and, for paths given, features or finished runs.

    python scripts/howmany.py                    # 20 sets of 2 to 30 groups, 10 of noise
    python scripts/howmany.py runs/a x.npy       # what it says of these, with every seed of --seeds

The made sets: 2 to 30 Gaussians in 2 to 100 dimensions, 40 to 240 images each, every one with axes of its own, 0.4 to
1.6 long; along the line between two centres these lie 4 standard deviations of both or more apart.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from deepcluster import outputs
from deepcluster.howmany import evidence

NUMBERS = (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
APART = 4.0


def groups(seed: int) -> tuple[np.ndarray, int]:
    """(N, D) images and the number of groups they were made of."""
    rng = np.random.default_rng(seed)
    k = NUMBERS[seed % len(NUMBERS)]
    dim = int(rng.choice([2, 3, 5, 10, 20, 50, 100]))
    dim = 3 if dim == 2 and k > 12 else dim  # there is no room for them in two
    shapes = [np.linalg.qr(rng.normal(size=(dim, dim)))[0] * np.exp(rng.uniform(np.log(0.4), np.log(1.6), dim))
              for _ in range(k)]  # fmt: skip
    centres: list[np.ndarray] = []
    side = 6.0
    while len(centres) < k:
        centre, side = rng.uniform(-side, side, dim), side * 1.002
        if all(_apart(centre - c, shapes[len(centres)], shapes[i]) >= APART for i, c in enumerate(centres)):
            centres.append(centre)
    sizes = np.round(40 * np.exp(rng.uniform(0, np.log(6), k))).astype(int)
    parts = [c + rng.normal(size=(n, dim)) @ s.T for c, s, n in zip(centres, shapes, sizes, strict=True)]
    return rng.permutation(np.concatenate(parts).astype(np.float32)), k


def _apart(line: np.ndarray, one: np.ndarray, other: np.ndarray) -> float:
    length = np.linalg.norm(line)
    spread = np.linalg.norm(line / length @ one) + np.linalg.norm(line / length @ other)
    return float(length / spread)


def noise(seed: int) -> np.ndarray:
    """(N, D): uniform in a cube, or one Gaussian, round or long."""
    rng = np.random.default_rng(1000 + seed)
    dim = [2, 5, 10, 30, 100][seed // 2 % 5]
    n = [300, 1000, 3000, 1000, 5000, 600, 2000, 800, 4000, 1500][seed % 10]
    if seed % 2:
        return rng.uniform(size=(n, dim)).astype(np.float32)
    x = rng.normal(size=(n, dim))
    return (x * np.exp(rng.uniform(-1, 1, dim)) if seed % 4 == 0 else x).astype(np.float32)


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", metavar="RUN|FILE.npy")
    parser.add_argument("--seeds", type=int, default=3, help="of the samples and k-means, for these (default 3)")
    parser.add_argument("--sets", type=int, default=20)
    parser.add_argument("--noises", type=int, default=10)
    args = parser.parse_args()
    for path in map(Path, args.paths):
        features = outputs.read_features(path) if path.is_dir() else np.load(path, mmap_mode="r")
        for seed in range(args.seeds):
            began = time.perf_counter()
            found = evidence(features, seed=seed, cosine=path.is_dir())
            print(f"{path} seed {seed}: {found.sentence()}; {time.perf_counter() - began:.1f} s", flush=True)
    if args.paths:
        return
    exact = 0
    for seed in range(args.sets):
        x, k = groups(seed)
        found = evidence(x)
        exact += found.answers[:1] == (k,)
        print(f"set {seed:>2}: {x.shape[0]} x {x.shape[1]}, {k} groups: {found.answers}", flush=True)
    none, most = 0, 0.0
    for seed in range(args.noises):
        x = noise(seed)
        found = evidence(x)
        none += found.answers == ()
        most = max(most, *(row.gain for row in found.rows))
        print(f"noise {seed:>2}: {x.shape[0]} x {x.shape[1]}: {found.answers}", flush=True)
    print(f"exact in {exact} of {args.sets}; no structure in {none} of {args.noises}, largest gain {most:.2f}")


if __name__ == "__main__":
    main()
