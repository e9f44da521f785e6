"""How far confidence is from accuracy, and what the nuisance check says, for one source and several seeds.

    python scripts/confidence.py digits --seeds 5 --out runs/confidence
    python scripts/confidence.py mnist.parquet --images 10000 --seeds 1 --out runs/confidence
    python scripts/confidence.py --plant --seeds 3 --out runs/planted

A line a run: accuracy, mean confidence, expected calibration error of confidence and of the network's own probability,
and the factors warned of. Runs that are there are not made again. Labels are used for these figures only. ``--plant``
makes folders of drawings of 2 kinds instead, some as they are, some with half of the images brighter, some with these
in a folder of their own.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from deepcluster import DeepCluster, evaluate, load, nuisance
from deepcluster.outputs import read_config, reopen
from deepcluster.reliability import reliability


def judge(run: Path, seed: int) -> None:
    """Print what came of one run."""
    model, data = load(run), read_config(run)["data"]
    source = reopen(data, None)
    place = {name: i for i, name in enumerate(source.names)}
    true = evaluate.encode(source.classes)
    cluster, table = model.labels_, model.image_info()
    factors = nuisance.read(run)
    assert factors is not None
    found = nuisance.effects(factors, cluster)
    warned = [one.factor for one in nuisance.explaining(found, len(set(cluster)), data["labels"] == "auto")]
    said = f"{run.name} seed {seed}: "
    if true is not None and len(set(true)) > 1:
        true = true[[place[name] for name in model.names_]]
        sure, p = (table[name].to_numpy() for name in ("confidence", "probability"))
        errors = [reliability(x, cluster, true)["ece"] for x in (sure, p)]
        said += f"acc {evaluate.scores(cluster, true, 1)['acc']:.3f} confidence {sure.mean():.3f} "
        said += f"ece {errors[0]:.3f} (of probability {errors[1]:.3f}) "
    strongest = f"{found[0].factor} {found[0].size:.2f}" if found else "nothing"
    print(f"{said}strongest {strongest}; warned of: {', '.join(warned) or 'nothing'}", flush=True)


def first(file: str, n: int, folder: Path) -> str:
    """A Parquet file with the first n images of one."""
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{Path(file).stem}-{n}.parquet"
    if not out.exists():
        pq.write_table(pq.read_table(file).slice(0, n), out)
    return str(out)


def plant(folder: Path, what: str, seed: int, n: int = 600) -> str:
    """Drawings of stripes, half of them ``bright`` or of another ``folder``; or ``clean``."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:32, :32]
    for i in range(n):
        angle, half = np.pi * rng.integers(2) / 2, bool(rng.integers(2))
        wave = np.sin(0.6 * (np.cos(angle) * x + np.sin(angle) * y) + rng.uniform(0, 2 * np.pi))
        grey = 90 + 25 * wave + rng.normal(0, 8) + rng.normal(0, 5, (32, 32)) + 110 * (half and what != "clean")
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
        place = folder / ("AB"[half] if what == "folder" else "")
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{i:04d}.png")
    return str(folder)


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="digits")
    parser.add_argument("--images", type=int, help="only the first so many, of a Parquet file")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--clusters", type=int, default=10)
    parser.add_argument("--plant", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    source = first(args.source, args.images, args.out) if args.images else args.source
    for seed in range(args.seeds):
        todo = [(Path(source).stem, source, args.clusters, "auto")]
        if args.plant:
            made = {what: args.out / "images" / f"{what}-{seed}" for what in ("clean", "bright", "folder")}
            todo = [(w, str(f) if f.exists() else plant(f, w, seed), 2, "none") for w, f in made.items()]
        for name, images, k, labels in todo:
            run = args.out / f"{name}-{seed}"
            if not (run / "report.html").exists():
                more = {"method": "sela", "epochs": 4} if args.plant else {}
                model = DeepCluster(k, random_state=seed, out=str(run), overwrite=True, **more)
                model._fit(images, labels=labels)
            judge(run, seed)


if __name__ == "__main__":
    main()
