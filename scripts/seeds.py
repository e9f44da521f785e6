"""Fit one source with several seeds, each in a process of its own; print ACC, NMI, ARI and time, median and range.

    python scripts/seeds.py digits --seeds 10
    python scripts/seeds.py train.parquet --first 10000 --seeds 3 -- --method simclr+sela

Arguments after ``--`` go to ``deepcluster fit``. ``--first N`` takes the first N rows of a Parquet file. Labels are
read for the scores only: no seed, head or epoch is chosen by them.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def first_rows(file: str, n: int, folder: Path) -> str:
    """A Parquet file of the first n rows of another."""
    import pyarrow.parquet as pq

    out = folder / f"{Path(file).stem}-{n}.parquet"
    pq.write_table(pq.read_table(file).slice(0, n), out)
    return str(out)


def one(source: str, seed: int, folder: Path, extra: list[str]) -> dict[str, float]:
    """Scores of one run; ``train`` is the time of training alone, ``wall`` of the whole process."""
    run, program = folder / f"seed{seed}", [sys.executable, "-m", "deepcluster"]
    options = ["--out", str(run), "--seed", str(seed), "--quiet", *extra]
    began = time.perf_counter()
    subprocess.run([*program, "fit", source, *options], check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - began
    evaluated = subprocess.run([*program, "evaluate", str(run)], check=True, capture_output=True, text=True)
    scores = json.loads(evaluated.stdout)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {k: scores[k] for k in ("acc", "nmi", "ari")} | {"train": sum(r["seconds"] for r in rows), "wall": wall}


def main() -> None:
    """Print one line a seed, then the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--seeds", type=int, default=10, help="how many: 0 .. seeds - 1")
    parser.add_argument("--first", type=int, help="only so many rows of a Parquet file")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, options = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        source = first_rows(args.source, args.first, Path(folder)) if args.first else args.source
        for seed in range(args.seeds):
            results.append(one(source, seed, Path(folder), options))
            print(f"seed {seed}  " + "  ".join(f"{k} {v:.3f}" for k, v in results[-1].items()), flush=True)
    for key in results[0]:
        values = [r[key] for r in results]
        print(
            f"{key:5s}  n {len(values)}  median {statistics.median(values):.3f}  mean {statistics.mean(values):.3f}  "
            f"range {min(values):.3f} to {max(values):.3f}"
        )


if __name__ == "__main__":
    main()
