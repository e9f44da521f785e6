"""Compare methods, plans and known baselines on one source: several seeds of each, a process a run, one table.

    python scripts/compare.py digits --seeds 10
    python scripts/compare.py digits --seeds 3 --methods iic "iic --set sub_heads=3" simclr+sela auto \\
        --baselines kmeans spectral umap+hdbscan clustpy:dec --out digits.jsonl
    python scripts/compare.py train.parquet --first 10000 --seeds 3 --out mnist.jsonl -- --epochs 20
    python scripts/compare.py --table digits.jsonl mnist.jsonl

An entry of ``--methods`` is a method or plan with options of its own; arguments after ``--`` go to every ``deepcluster
fit``. ``--first N`` takes the first N rows of a Parquet file. Every finished run is appended to ``--out`` at once, and
one that is there already is not run again: start an interrupted comparison once more and it goes on. Failures, and runs
over ``--time-limit``, stay in the table. Labels are read for the scores only: no seed, head or epoch is chosen by them.
What the baselines do is said in ``baselines.py``.
"""

import argparse
import concurrent.futures
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from baselines import MISSING, NAMES, ROOT
from tables import Record, of, read, tables

SHARED = ("image_size", "device", "data_root", "labels")  # options of methods and baselines alike
OURS = ("--seed", "--n-clusters", "--out", "--method")
FIRST_ROWS = """import sys, pyarrow.parquet as pq
pq.write_table(pq.read_table(sys.argv[1]).slice(0, int(sys.argv[2])), sys.argv[3])"""
LIVE: set[int] = set()  # process groups under way
STOPPING = threading.Event()


def fail(message: str) -> NoReturn:
    """Wrong input: one line."""
    print(f"compare: error: {message}", file=sys.stderr)
    sys.exit(2)


def kill(group: int) -> None:
    """End a process with all it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def run(command: list[str], env: dict[str, str], limit: float | None) -> tuple[Record, str]:
    """Wall seconds, peak memory in MB, exit code and error (or None) of one process, and what it printed.

    The peak that Linux tells of a process starts at that of its parent, so this one imports nothing big.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began, late = time.perf_counter(), threading.Event()
        process = subprocess.Popen(command, stdout=out, stderr=err, env=env, start_new_session=True)
        LIVE.add(process.pid)
        if STOPPING.is_set():
            kill(process.pid)

        def too_late() -> None:
            late.set()
            kill(process.pid)

        timer = threading.Timer(limit or 0, too_late)
        if limit:
            timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        LIVE.discard(process.pid)
        kill(process.pid)  # what it may have left behind
        process.returncode = code = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - began
        out.seek(0)
        err.seek(0)
        lines = err.read().decode(errors="replace").strip().splitlines()
        error = None
        if code:
            error = lines[-1].strip() if lines else f"exit code {code}" if code > 0 else f"killed by signal {-code}"
        if late.is_set() and code < 0:
            error = f"took longer than the {limit:g} s of --time-limit"
        memory = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        return {"wall_s": wall, "memory_mb": memory, "exit": code, "error": error}, out.read().decode(errors="replace")


def fit(task: Record, source: str, env: dict[str, str], limit: float | None) -> Record:
    """One run of ours: fit, then evaluate."""
    program = [sys.executable, "-m", "deepcluster"]
    with tempfile.TemporaryDirectory() as folder:
        options = ["--out", f"{folder}/run", "--seed", str(task["seed"]), "--quiet", "--method", task["method"]]
        options += ["--n-clusters", str(task["n_clusters"]), *task["options"]]
        found, _ = run([*program, "fit", source, *options], env, limit)
        if found["exit"]:
            return found
        evaluated, text = run([*program, "evaluate", f"{folder}/run"], env, limit)
        if evaluated["exit"]:
            return {**found, "exit": evaluated["exit"], "error": evaluated["error"]}
        lines = Path(folder, "run/metrics.jsonl").read_text().splitlines()
        size, channels = json.loads(Path(folder, "run/config.json").read_text())["data"]["size"]
        scores = {k: v for k, v in json.loads(text).items() if k not in ("split", "splits")}
        shape = [channels, size, size] if size > 1 else [channels]
        return {**found, **scores, "train_s": sum(json.loads(line)["seconds"] for line in lines), "shape": shape}


def known(task: Record, source: str, env: dict[str, str], limit: float | None) -> Record:
    """One run of a baseline."""
    command = [sys.executable, str(ROOT / "scripts/baselines.py"), task["method"], source, "--seed", str(task["seed"])]
    found, text = run([*command, "--n-clusters", str(task["n_clusters"]), *task["options"]], env, limit)
    if found["exit"]:
        return found
    scores = json.loads(text)
    return {**found, "train_s": scores.pop("seconds"), **scores}


def commit() -> str:
    """Of this tree, with a plus if files are changed."""
    git = ["git", "-C", str(ROOT)]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        short = subprocess.run([*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], check=True, capture_output=True, text=True)
        return short.stdout.strip() + ("+" if changed.stdout.strip() else "")
    return "unknown"


def append(file: Path, record: Record) -> None:
    """One line more, on a line of its own even if the last one was cut short."""
    whole = not file.exists() or file.read_bytes()[-1:] in (b"", b"\n")
    with file.open("a", encoding="utf-8") as f:
        f.write(("" if whole else "\n") + json.dumps(record) + "\n")


def asked(args: argparse.Namespace, extra: list[str]) -> list[Record]:
    """The runs asked for, all methods of one seed before the next seed."""
    shared = [x for n in SHARED if getattr(args, n) for x in (f"--{n.replace('_', '-')}", getattr(args, n))]
    entries = [("baseline", name, shared) for name in args.baselines]
    for entry in args.methods or ([] if args.baselines else ["auto"]):
        method, *own = shlex.split(entry) or [""]
        entries.append(("method", method, [*shared, *own, *extra]))
    same = {"source": args.source, "first": args.first, "n_clusters": args.n_clusters}
    every = [{**same, "kind": kind, "method": name, "options": options, "seed": seed}
             for seed in range(args.seeds) for kind, name, options in entries]  # fmt: skip
    return list({of(task): task for task in every}.values())


def comparison(args: argparse.Namespace, tasks: list[Record]) -> list[Record]:
    """Run what is not in the file yet; the records of everything asked for."""
    sys.path.insert(0, str(ROOT))
    from deepcluster import __version__
    from deepcluster.doctor import cpu_count

    before = read([args.out]) if args.out and Path(args.out).exists() and args.again != "all" else []
    before = [record for record in before if record["error"] != MISSING and not (args.again and record["exit"])]
    results = {of(record): record for record in before}
    left = [task for task in tasks if of(task) not in results]
    if len(left) < len(tasks):
        print(f"{len(tasks) - len(left)} of {len(tasks)} runs are in {args.out}", flush=True)
    threads, lock = max(1, int(os.environ.get("OMP_NUM_THREADS") or cpu_count()) // args.jobs), threading.Lock()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    env |= {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL", "OPENBLAS", "NUMBA")}

    def one(task: Record, source: str) -> None:
        stamp = {"commit": commit(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                 "torch": version("torch"), "deepcluster": __version__, "threads": threads, "jobs": args.jobs,
                 "time_limit": args.time_limit}  # fmt: skip
        found = (fit if task["kind"] == "method" else known)(task, source, env, args.time_limit)
        found = {k: round(v, 6) if isinstance(v, float) else v for k, v in found.items()}
        record = {**task, **found, **stamp}
        if STOPPING.is_set():
            return
        with lock:
            results[of(record)] = record
            if args.out:
                append(Path(args.out), record)
            numbers = ("acc", "nmi", "ari", "train_s", "wall_s")
            said = record["error"] or "  ".join(f"{k} {record[k]:.3f}" for k in numbers)
            print(f"{shlex.join([record['method'], *record['options']])}  seed {record['seed']}  {said}", flush=True)

    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        try:
            source = args.source
            if args.first and left:
                source = f"{folder}/{Path(source).stem}-{args.first}.parquet"
                env["DEEPCLUSTER_CACHE"] = f"{folder}/cache"  # nobody will want these images again
                cut, _ = run([sys.executable, "-c", FIRST_ROWS, args.source, str(args.first), source], env, None)
                if cut["exit"]:
                    fail(f"--first takes rows of one Parquet file; {args.source}: {cut['error']}")
            for future in concurrent.futures.as_completed([pool.submit(one, task, source) for task in left]):
                future.result()
        except BaseException:  # Ctrl-C too: the runs are sessions of their own and would go on
            STOPPING.set()
            for group in list(LIVE):
                kill(group)
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [results[of(task)] for task in tasks]


def main() -> int:
    """Run what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?")
    parser.add_argument("--seeds", type=int, default=10, help="how many: 0 .. seeds - 1 (default 10)")
    parser.add_argument("--methods", nargs="+", help="methods or plans, each with its options in one word (auto)")
    parser.add_argument("--baselines", nargs="+", default=[], metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--n-clusters", type=int, default=10)
    parser.add_argument("--first", type=int, metavar="N", help="only so many rows of a Parquet file")
    parser.add_argument("--image-size", help="pixels a side, for all; default what fit chooses")
    parser.add_argument("--device", help="for all")
    parser.add_argument("--data-root", help="where torchvision's data sets are")
    parser.add_argument("--labels", metavar="FILE.csv", help="for the scores, if the source has none")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="of one run; then it is killed")
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="runs at once, sharing the processors")
    parser.add_argument("--out", metavar="FILE.jsonl", help="append every run here; skip those that are there")
    parser.add_argument("--again", nargs="?", const="all", choices=("all", "failed"), help="run also what is in --out")
    parser.add_argument("--table", nargs="+", metavar="FILE.jsonl", help="only print the tables of these files")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, extra = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    if args.table:
        for file in args.table:
            if not Path(file).is_file():
                fail(f"no file {file}")
        print(tables(read(args.table)))
        return 0
    if not args.source:
        fail("give a SOURCE, or --table FILE.jsonl")
    for name in args.baselines:
        if name not in NAMES:
            fail(f"unknown baseline {name!r}; choose from {', '.join(NAMES)}")
    flags = {f"--{name.replace('_', '-')}" for name in SHARED}
    words = [(word, OURS) for entry in args.methods or [] for word in shlex.split(entry)]
    for word, taken in [*words, *((word, (*OURS, *flags)) for word in extra)]:
        if word.split("=")[0] in taken:
            fail(f"give {word} to compare.py itself, before any --, so that every run has it (methods: --methods)")
    if min(args.seeds, args.jobs) < 1:
        fail("--seeds and --jobs must be at least 1")
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    try:
        print("\n" + tables(comparison(args, asked(args, extra))))
    except KeyboardInterrupt:
        print("compare: interrupted; start it again with the same --out and it goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
