"""How far confidence is from accuracy, for one source and several seeds.

    python scripts/confidence.py digits --seeds 5 --out runs/confidence
    python scripts/confidence.py mnist.parquet --images 10000 --seeds 1 --out runs/confidence

A line a run: accuracy, mean confidence, expected calibration error of confidence and of the network's own probability.
Runs that are there are not made again. Labels are used for these figures only.
"""

import argparse
from pathlib import Path

from deepcluster import DeepCluster, evaluate, load
from deepcluster.outputs import read_config, reopen
from deepcluster.reliability import reliability


def judge(run: Path, seed: int) -> None:
    """Print what came of one run."""
    model, data = load(run), read_config(run)["data"]
    source = reopen(data, None)
    place = {name: i for i, name in enumerate(source.names)}
    true = evaluate.encode(source.classes)
    cluster, table = model.labels_, model.image_info()
    said = f"{run.name} seed {seed}: "
    if true is not None and len(set(true)) > 1:
        true = true[[place[name] for name in model.names_]]
        sure, p = (table[name].to_numpy() for name in ("confidence", "probability"))
        errors = [reliability(x, cluster, true)["ece"] for x in (sure, p)]
        said += f"acc {evaluate.scores(cluster, true, 1)['acc']:.3f} confidence {sure.mean():.3f} "
        said += f"ece {errors[0]:.3f} (of probability {errors[1]:.3f})"
    print(said, flush=True)


def first(file: str, n: int, folder: Path) -> str:
    """A Parquet file with the first n images of one."""
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{Path(file).stem}-{n}.parquet"
    if not out.exists():
        pq.write_table(pq.read_table(file).slice(0, n), out)
    return str(out)


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="digits")
    parser.add_argument("--images", type=int, help="only the first so many, of a Parquet file")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--clusters", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    source = first(args.source, args.images, args.out) if args.images else args.source
    for seed in range(args.seeds):
        run = args.out / f"{Path(source).stem}-{seed}"
        if not (run / "report.html").exists():
            model = DeepCluster(args.clusters, random_state=seed, out=str(run), overwrite=True)
            model._fit(source, labels="auto")
        judge(run, seed)


if __name__ == "__main__":
    main()
