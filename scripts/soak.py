"""Kills runs at random moments, goes on with them, and compares the end: ``python scripts/soak.py --kills 200``.

Small runs of every method, alone or in plans of several stages, are trained undisturbed, and then killed by SIGKILL
again and again, at times drawn from the whole life of a run: while it reads images, trains, writes a checkpoint or its
results. Some are asked to stop instead, by SIGTERM or Ctrl-C. Each time ``deepcluster fit --resume RUN`` goes on, or
the command itself where nothing was begun. In the end both have to be the same bit for bit: weights, features, tables,
metrics and the last checkpoint; only clocks may differ. Exit code 1 if any run came out differently. A line for each
plan names what the runs were at when they were killed, or asked to stop (*).

An attempt is a process of its own that runs the command line. It is forked from one that has imported everything and
computed nothing, since importing takes longer than such a run.
"""

import argparse
import collections
import concurrent.futures
import csv
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import deepcluster.estimator  # before forking, as all that a run needs
from deepcluster import checkpoint, doctor
from deepcluster.__main__ import main as deepcluster
from deepcluster.recipe import METHODS, make_recipe

N, SIZE, BAD = 96, 12, 4  # images, their pixels a side, and how many more cannot be read
TINY = f"--n-clusters 3 --epochs 4 --image-size {SIZE} --batch-size 12 --workers 1 --quiet".split()
STAGES = ("simclr+scan+selflabel", "iic+sela", "moco+pcl", "rotnet+iic+fixmatch")
RESCUED = ("swav", "iic", "iic+swav", "sela")  # with a learning rate of 100 half of these collapse
FILES = ("model/model.safetensors", "model/config.json", "model/names.json", "assignments.parquet", "clusters.parquet",
         "features.npy", "skipped.csv", "map.npz")  # fmt: skip
PHASES = ("reading", "training", "mid-epoch", "saving", "ending", "done")
LEAST = 4  # kills a plan
LONGEST = 300.0  # seconds that an attempt may take before it counts as hanging


def plans() -> list[str]:
    """Options of ``fit`` for every method, for plans of several stages, and for runs that have to be rescued."""
    found = []
    for name in sorted(METHODS):
        recipe = make_recipe(name)
        found.append(f"{name}+sela" if recipe.pretext else f"sela+{name}" if recipe.continues else name)
    learning = [plan for plan in (*found, *STAGES) if make_recipe(plan.split("+")[-1]).supervised]
    found = [f"{plan} --labels few.csv --use-labels" if plan in learning else plan for plan in (*found, *STAGES)]
    return found + [f"{plan} --lr 100 --on-collapse rescue" for plan in RESCUED]


def draw(home: Path) -> None:
    """Folder ``photos``, with a file for some labels beside it."""
    rng, folder = np.random.default_rng(0), home / "photos"
    folder.mkdir()
    for i in range(N):
        image = rng.integers(0, 120, (SIZE, SIZE))
        image[:: 2 + i % 3] += 120
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{i:03d}.png")
    for i in range(BAD):
        (folder / f"bad{i}.png").write_bytes((folder / f"{i:03d}.png").read_bytes()[: 20 * i])
    with (home / "few.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label"), *((f"{i:03d}.png", "abc"[i % 3]) for i in range(0, N, 4))])


def start(home: Path, run: Path, argv: list[str]) -> int:
    """The number of a new process that goes on with ``run``, or begins it by ``fit ARGV`` if it was not."""
    if pid := os.fork():
        return pid
    code = 70
    try:
        os.chdir(home)
        os.environ["DEEPCLUSTER_CACHE"] = f"{run}-cache"
        said = os.open(f"{run}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        begun = (run / "config.json").exists()
        code = deepcluster(["fit", *(["--resume", str(run), "--quiet"] if begun else [*argv, "--out", str(run)])])
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int, seconds: float) -> int | None:
    """The exit code of a process, -N if signal N ended it; None if it still runs after this time."""
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None


def phase(run: Path, began: int) -> str:
    """What a process that began at this time (in ns) was at when it was killed, by the files it had written."""
    new = [path.name for path in run.glob("*") if path.stat().st_mtime_ns > began]
    if not (run / "config.json").exists() or "metrics.jsonl" not in new:
        return "reading"
    if (run / "checkpoints/last.tmp").exists():
        return "saving"
    last, stages = run / "checkpoints/last.pt", json.loads((run / "config.json").read_text())["plan"]["stages"]
    saved = checkpoint.read(last) if last.exists() else {"stage": 0, "epoch": 0, "step": 0}
    if (saved["stage"], saved["epoch"]) == (len(stages) - 1, stages[-1]["epochs"]):
        return "done" if "report.html" in new else "ending"
    return "mid-epoch" if saved["step"] else "training"


def plain(value: Any) -> Any:
    """What a checkpoint holds, tensors as bytes, so that NaN equals NaN; no learning rate: each step sets its own."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items() if key != "lr"}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else repr(value)


def rows(run: Path) -> list[dict]:
    """metrics.jsonl without its clocks."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second")} for line in lines]


def differences(one: Path, other: Path) -> list[str]:
    """What is not the same in a run and one that was killed; a collapsed one has no results, and no last epoch."""
    found = [path.name for path in other.rglob("*.tmp")]
    for name in FILES:
        a, b = (path.read_bytes() if path.exists() else None for path in (one / name, other / name))
        found += [name] if a != b else []
    found += [name for name in ("report.html", "env.json") if (one / name).exists() != (other / name).exists()]
    found += ["metrics.jsonl"] if rows(one) != rows(other) else []
    last = "checkpoints/last.pt" if (one / "assignments.parquet").exists() else "checkpoints/healthy.pt"
    a, b = (plain(checkpoint.read(run / last)) for run in (one, other))
    return found + [f"checkpoint: {key}" for key in a if a[key] != b[key]]


def torment(home: Path, number: int, plan: str, seed: int) -> tuple[list[str], list[str], str]:
    """Train a plan undisturbed, then killed until it ends in spite of that: phases of the kills, problems, a remark."""
    rng, whole, run = random.Random(f"{seed} {number}"), home / f"{number}", home / f"{number}-run"
    kills: list[str] = []
    problems: list[str] = []
    argv = ["photos", "--method", *plan.split(), *TINY, "--precision", rng.choice(["fp32", "bf16"])]
    argv += ["--seed", str(1000 * seed + number), *(["--checkpoint-every", "0.1s"] if rng.random() < 0.5 else [])]
    began = time.monotonic()
    wanted = ended(start(home, whole, argv), LONGEST)
    length = time.monotonic() - began
    if wanted not in (0, 3):  # 3: it collapsed and could not be rescued
        return kills, [f"undisturbed it ended with {wanted}; see {whole}.txt"], plan
    while len(kills) < LEAST and not problems:
        for folder in (run, f"{run}-cache"):
            shutil.rmtree(folder, ignore_errors=True)
        code = None
        while code != wanted and not problems:
            by = rng.choices([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], [8, 1, 1])[0]
            at, since = length * rng.betavariate(0.5, 1) + 0.1 * (by != signal.SIGKILL), time.time_ns()
            pid = start(home, run, argv)
            code = ended(pid, at)
            if code is None:
                os.kill(pid, by)
                code = ended(pid, LONGEST)
                kills.append(phase(run, since) + ("*" if by != signal.SIGKILL else ""))  # reads the checkpoint, too
            if code not in (wanted, -by if by == signal.SIGKILL else 130):
                problems.append(f"{by.name} after {at:.2f} s: exit {code}, see {run}.txt")
        problems += [] if problems else differences(whole, run)
    rescues = max((len(row.get("rescues", [])) for row in rows(whole)), default=0)
    return kills, problems, f"{plan}, rescued {rescues} times" if rescues else plan


def main() -> int:
    """Torment plan after plan until there were enough kills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many at least (default 200)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the runs and of the times (default 0)")
    parser.add_argument("--only", default="", metavar="WORD", help="plans with this in their options")
    args = parser.parse_args()
    torch.set_num_threads(1)
    doctor.packages()  # imports them
    home = Path(tempfile.mkdtemp(prefix="soak"))
    draw(home)
    order = [plan for plan in plans() if args.only in plan]
    random.Random(args.seed).shuffle(order)
    todo, kills, good, failed = enumerate(itertools.cycle(order)), 0, 0, 0
    phases = collections.Counter[str]()
    with concurrent.futures.ProcessPoolExecutor(args.jobs, get_context("fork")) as pool:
        under_way = {pool.submit(torment, home, *next(todo), args.seed) for _ in range(args.jobs)}
        while under_way:
            done, under_way = concurrent.futures.wait(under_way, return_when="FIRST_COMPLETED")
            for where, problems, plan in (future.result() for future in done):
                phases.update(one.strip("*") for one in where)
                kills, failed, good = kills + len(where), failed + bool(problems), good + len(where) * (not problems)
                print(f"{kills:4d} {'; '.join(problems) or 'equal'}: {plan}: {' '.join(where)}", flush=True)
                if kills < args.kills:
                    under_way.add(pool.submit(torment, home, *next(todo), args.seed))
    print(", ".join(f"{name} {phases[name]}" for name in PHASES))
    print(f"{good} of {kills} kills resumed bit-equal" + (f"; what went wrong is in {home}" if failed else ""))
    if not failed:
        shutil.rmtree(home)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
