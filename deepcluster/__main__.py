"""The command line: ``deepcluster COMMAND ...``.

Exit codes: 0 done, 2 wrong input, 3 training stopped itself, 130 interrupted.

deepcluster demo
deepcluster fit photos/ --out runs/a --n-clusters 20
deepcluster fit --resume runs/a
deepcluster predict runs/a more/ --out new.parquet
deepcluster evaluate runs/a --labels labels.csv
deepcluster export runs/a --format folders --out sorted/
deepcluster merge runs/a 3 17
deepcluster name runs/a 3 "red vans"
deepcluster methods
deepcluster doctor
"""

import argparse
import errno
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepcluster import options
from deepcluster.commands import COMMANDS
from deepcluster.terminal import Visible, visible


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):  # a path may hold bytes, and a name letters, that the terminal cannot show
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    argv = sys.argv[1:] if argv is None else argv
    args = options.parser(__doc__ or "").parse_args(argv)
    try:
        with _surroundings(args):
            COMMANDS[args.command](args)
        return 0
    except KeyboardInterrupt:
        print(f"deepcluster: interrupted; {_how_to_go_on(args)}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, FloatingPointError) as error:
        if args.debug:
            raise
        print(f"deepcluster: error: {_line(error, args)}", file=sys.stderr)
        return 3 if isinstance(error, FloatingPointError) else 2
    except Exception as error:
        if args.debug:
            raise
        if type(error).__name__ == "Collapse":  # without an import of torch
            print(f"deepcluster: error: {_line(error, args)}", file=sys.stderr)
            return 3
        if _out_of_memory(error):
            todo = "a smaller --batch-size or --image-size, or a smaller --backbone, needs less"
            print(f"deepcluster: error: out of memory; {todo}; {_how_to_go_on(args)}", file=sys.stderr)
            return 2
        if "RANK" in os.environ and any(word in str(error) for word in ("gloo", "NCCL", "onnection ")):
            print(
                f"deepcluster: error: another process ended: see what it said; {_how_to_go_on(args)}", file=sys.stderr
            )
            return 1
        what = f"{type(error).__name__}: {visible(' '.join(str(error).split()))}"
        print(f"deepcluster: internal error: {what}; please report it with the output of --debug", file=sys.stderr)
        return 1


@contextmanager
def _surroundings(args: argparse.Namespace) -> Iterator[None]:
    """Remarks go to stderr, warnings of libraries nowhere, and SIGTERM is like Ctrl-C."""
    log = logging.getLogger("deepcluster")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Visible("%(message)s"))
    handler.setLevel(logging.WARNING if args.quiet else logging.INFO if sys.stderr.isatty() else logging.DEBUG)
    if os.environ.get("RANK", "0") != "0":
        handler.setLevel(logging.ERROR)
    level, signals = log.level, threading.current_thread() is threading.main_thread()

    def terminate(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, terminate) if signals else None
    log.setLevel(logging.DEBUG)
    log.addHandler(handler)
    try:
        with warnings.catch_warnings():
            if not args.debug:
                warnings.simplefilter("ignore")
            yield
    finally:
        if signals:
            signal.signal(signal.SIGTERM, previous)
        log.removeHandler(handler)
        log.setLevel(level)


def _how_to_go_on(args: argparse.Namespace) -> str:
    run = getattr(args, "resume", None) or getattr(args, "out", None)
    if args.command in options.RUNS and run and (Path(run) / "config.json").exists():
        return f"go on with: deepcluster fit --resume {run}"
    if args.command in options.EDITS:
        return f"the edit was made, or not: look at {args.run}/clusters.parquet before you repeat it"
    return "nothing was written; start it again"


def _out_of_memory(error: Exception) -> bool:
    """Whether Python, torch on a CPU or torch on a GPU found no memory; each says so in its own way."""
    said = "not enough memory" in str(error) or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or said


def _line(error: Exception, args: argparse.Namespace) -> str:
    """The error on one line, with what to do where the system's own words do not say."""
    text = visible(" ".join(str(error).split()))
    if not isinstance(error, OSError) or error.strerror is None:
        return text
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    todo = f"free some space; {_how_to_go_on(args)}" if full else "give a place that can be read and written"
    where = "" if error.filename is None else f"{visible(os.fsdecode(error.filename))}: "
    return f"{where}{error.strerror[:1].lower()}{error.strerror[1:]}; {todo}"


if __name__ == "__main__":
    sys.exit(main())
