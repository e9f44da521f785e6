"""What the nuisance check says: of runs that are there, or of planted splits.

    python scripts/nuisance.py runs/digits runs/flowers
    python scripts/nuisance.py --plant --seeds 3 --out runs/planted
    python scripts/nuisance.py --plant --images mnist.parquet --seeds 1 --out runs/planted

A line a run: its strongest factors and those warned of. ``--plant`` makes folders of images of which half are brighter,
without a sign of it (``bright``), or in a folder, by a camera, or in files of a type of their own; and ``clean`` ones.
The images are drawings of 2 kinds, or the first 600 of a Parquet file. Their runs have 2 clusters and see no labels.
"""

import argparse
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from deepcluster import DeepCluster, load, nuisance
from deepcluster.outputs import read_config

PLANTS = ("clean", "bright", "folder", "camera", "type")
N = 600


def judge(run: Path) -> list[str]:
    """Print what the check says of a run; the factors it warns of."""
    cluster, factors = load(run).labels_, nuisance.read(run)
    assert factors is not None, f"{run} has no factors.parquet"
    found = nuisance.effects(factors, cluster)
    by_folder = read_config(run)["data"]["labels"] == "auto"
    warned = [one.factor for one in nuisance.explaining(found, len(set(cluster)), by_folder)]
    strongest = ", ".join(f"{one.factor} {one.size:.2f}" for one in found[:3]) or "nothing"
    print(f"{run}: strongest {strongest}; warned of: {', '.join(warned) or 'nothing'}", flush=True)
    return warned


def drawn(rng: np.random.Generator) -> np.ndarray:
    """(32, 32) a drawing of upright or of level stripes."""
    y, x = np.mgrid[:32, :32]
    angle = np.pi * rng.integers(2) / 2
    wave = np.sin(0.6 * (np.cos(angle) * x + np.sin(angle) * y) + rng.uniform(0, 2 * np.pi))
    return 90 + 25 * wave + rng.normal(0, 8) + rng.normal(0, 5, (32, 32))


def plant(folder: Path, what: str, seed: int, given: list[bytes]) -> None:
    """Write N images, half of them brighter unless ``clean``, and with one of PLANTS to tell them by."""
    rng = np.random.default_rng(seed)
    for i in range(N):
        half = bool(rng.integers(2))
        if given:  # darker first, so that nothing is cut off
            pixels = 0.55 * np.asarray(Image.open(io.BytesIO(given[i])).convert("RGB"), float)
        else:
            pixels = drawn(rng)
        image = Image.fromarray((pixels + 110 * (half and what != "clean")).clip(0, 255).astype(np.uint8))
        exif = Image.Exif()
        if what == "camera":
            exif[0x010F], exif[0x0110] = "Maker", "One" if half else "Two"
        place = folder / ("AB"[half] if what == "folder" else "")
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{i:04d}.{'png' if what == 'type' and half else 'jpg'}", exif=exif)


def main() -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--plant", action="store_true")
    parser.add_argument("--images", type=Path, help="a Parquet file to plant in, instead of drawings")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for run in args.runs:
        judge(run)
    if not args.plant:
        return
    if args.out is None:
        parser.error("--plant needs --out")
    missed = dict.fromkeys(PLANTS, 0)
    for seed in range(args.seeds):
        given = []
        if args.images:
            given = [one["bytes"] for one in pq.read_table(args.images)["image"].slice(seed * N, N).to_pylist()]
        for what in PLANTS:
            name = f"{args.images.stem if args.images else 'drawn'}-{what}-{seed}"
            images, run = args.out / "images" / name, args.out / name
            if not (run / "report.html").exists():
                plant(images, what, seed, given)
                model = DeepCluster(2, method="sela", epochs=4, random_state=seed, out=str(run), overwrite=True)
                model._fit(str(images), labels="none")
            warned = judge(run)
            wrong = bool(warned) if what == "clean" else "brightness" not in warned
            missed[what] += wrong or (
                what not in ("clean", "bright") and f"{'file ' * (what == 'type')}{what}" not in warned
            )
    print("wrong, of", args.seeds, "seeds:", ", ".join(f"{what} {n}" for what, n in missed.items()))


if __name__ == "__main__":
    main()
