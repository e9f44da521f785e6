"""The words of the command line. Needs no torch, so that ``--help`` and a typing error are answered at once."""

import argparse
import inspect
import json
import re
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from deepcluster import __version__
from deepcluster.settings import Settings

EDITS = ("merge", "split", "name", "junk", "reduce-outliers", "undo")
RUNS = ("demo", "fit", "cluster")
COMMANDS = (*RUNS, "predict", "evaluate", "advise", "export", "report", *EDITS, "k", "recut", "methods", "doctor")
FORMATS = ("npy", "parquet", "safetensors", "model", "onnx", "folders", "projector")
NAMES = [f.name for f in fields(Settings)]


class Parser(argparse.ArgumentParser):
    """One line on stderr, with the nearest right word, instead of a page of usage."""

    flags: frozenset[str] = frozenset()  # of all commands: the parser that finds a word left over knows only its own

    def error(self, message: str) -> NoReturn:
        """Exit 2, saying what is allowed."""
        known = [*COMMANDS, *Parser.flags]
        words = message.replace("'", " ").replace("=", " ").split()
        near = next(
            (m[0] for w in words if w not in known and (m := get_close_matches(w, known, n=1, cutoff=0.7))), None
        )
        guess = f"; did you mean {near}?" if near else f"; see {self.prog} --help"
        text = f"{self.prog}: error: {' '.join(message.split())}{guess}\n"
        self.exit(2, text.encode("utf-8", "backslashreplace").decode())


def _number_or_auto(kind: type) -> Any:
    def read(text: str) -> Any:
        return text if text == "auto" else kind(text)

    read.__name__ = f"{'whole number' if kind is int else 'number'} or auto"
    return read


def parser(description: str) -> Parser:
    """Every command and flag; those of ``fit`` follow from the fields of Settings."""
    main = Parser(
        prog="deepcluster",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    main.add_argument("--version", action="version", version=__version__)
    commands = main.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")
    common = Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show warnings, and the traceback of an error")
    common.add_argument("--quiet", action="store_true", help="no progress bars, no remarks")
    common.add_argument("--data-root", help="where torchvision's data sets are")

    def command(name: str, says: str) -> Parser:
        return commands.add_parser(name, parents=[common], help=says, description=says, allow_abbrev=False)

    fit = command("fit", "cluster a source; writes a run directory")
    _run(fit)
    best = command("cluster", "the best clusters of a pretrained backbone's features; several methods are tried")
    _run(best)
    best.set_defaults(method="best")
    demo = command("demo", "cluster scikit-learn's digits in a minute")
    demo.add_argument("--out", metavar="RUN", default="runs/demo", help="run directory (default runs/demo)")
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier run in RUN")

    predict = command("predict", "label new images with a trained run")
    predict.add_argument("run", metavar="RUN")
    predict.add_argument("source", metavar="SOURCE")
    predict.add_argument("--out", required=True, metavar="FILE.parquet")
    predict.add_argument("--device", default="auto")
    predict.add_argument(
        "--abstain", type=float, default=0.0, metavar="LEAST", help="cluster -1 for images of less confidence, e.g. 0.8"
    )

    evaluate = command("evaluate", "scores against known labels, as one JSON object")
    evaluate.add_argument("run", metavar="RUN")
    evaluate.add_argument("source", metavar="SOURCE", nargs="?", help="default: the images of the run")
    evaluate.add_argument("--labels", default="auto", metavar="FILE.csv", help="auto (the source's own) or a file")
    evaluate.add_argument("--probe", metavar="KINDS", help="what the features are worth: linear, knn or linear,knn")
    evaluate.add_argument("--device", default="auto")

    advise = command("advise", "which of the backbones at hand fits these images, judged without labels")
    advise.add_argument("source", metavar="SOURCE")
    advise.add_argument("--backbone", action="append", default=[], metavar="NAME[=FILE]", help="another to judge")
    advise.add_argument("--n", type=int, default=2000, metavar="N", help="images to look at (default 2000)")
    advise.add_argument("--device", default="auto")

    export = command("export", "features, model or images of a run, for other tools")
    export.add_argument("run", metavar="RUN")
    export.add_argument("--format", required=True, metavar="FORMAT", help=", ".join(FORMATS))
    export.add_argument("--out", required=True, metavar="PATH")
    export.add_argument("--copy", action="store_true", help="folders: copy the images instead of linking to them")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export, with all in it")

    command("report", "write RUN/report.html anew").add_argument("run", metavar="RUN")

    edit = {name: command(name, says) for name, says in {
        "merge": "make one cluster of several", "split": "make several clusters of one", "name": "name a cluster",
        "junk": "mark clusters as junk", "reduce-outliers": "move outliers to the nearest cluster",
        "undo": "take the last edit back",
    }.items()}  # fmt: skip
    for one in edit.values():
        one.add_argument("run", metavar="RUN")
    edit["merge"].add_argument("clusters", metavar="CLUSTER", type=int, nargs="*")
    edit["merge"].add_argument(
        "--from", dest="decisions", metavar="FILE.json", help="what was decided on the report page"
    )
    edit["split"].add_argument("cluster", metavar="CLUSTER", type=int)
    edit["split"].add_argument("--into", type=int, default=2, metavar="N", help="parts (default 2)")
    edit["name"].add_argument("cluster", metavar="CLUSTER", type=int)
    edit["name"].add_argument("name", metavar="NAME", help="an empty one takes the name away")
    edit["junk"].add_argument("clusters", metavar="CLUSTER", type=int, nargs="+")
    edit["junk"].add_argument("--off", action="store_true", help="take the mark away")

    k = command("k", "how many clusters there are, with the evidence")
    k.add_argument("source", metavar="SOURCE|RUN", help="features, a finished run, or images with --backbone")
    k.add_argument("--min", type=int, default=2, metavar="K", help="smallest number looked at (default 2)")
    k.add_argument("--max", type=int, metavar="K", help="largest number looked at (default 60)")
    k.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    k.add_argument("--backbone", metavar="BACKBONE", help="of images: a pretrained network, as in fit")
    k.add_argument("--weights", metavar="FILE", help="its weights")
    k.add_argument("--seed", type=int, default=0, metavar="SEED")
    recut = command("recut", "another number of clusters, without training")
    recut.add_argument("run", metavar="RUN")
    recut.add_argument("--k", type=int, required=True, metavar="K")

    command("methods", "every method and its parameters")
    command("doctor", "versions, devices, what is missing")
    Parser.flags = frozenset(
        s for p in (main, *commands.choices.values()) for a in p._actions for s in a.option_strings
    )
    return main


def _run(one: Parser) -> None:
    """What begins a run is told: those of ``fit`` and of ``cluster`` are the same."""
    one.add_argument(
        "source", nargs="?", metavar="SOURCE", help="folder, glob, list, .npy, Parquet, tar, digits, torchvision:NAME"
    )
    one.add_argument("--out", metavar="RUN", help="run directory; must be new or empty")
    one.add_argument("--overwrite", action="store_true", help="replace an earlier run in RUN")
    one.add_argument("--resume", metavar="RUN", help="go on with a run that was stopped")
    one.add_argument(
        "--labels", metavar="FILE.csv", help="known labels, for scores: auto (default), none, a file; see --use-labels"
    )
    one.add_argument("--config", metavar="FILE.json", help="options as a JSON object; flags given here win")
    one.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the method")
    one.add_argument("--workers", type=int, metavar="N", help="threads that decode images; default one a processor")
    one.add_argument("--dry-run", action="store_true", help="print what memory, disk and time it would take, and stop")
    says = dict(re.findall(r"^ +(\w+): (.+)$", inspect.getdoc(Settings) or "", re.M))
    kinds = {"int | str": _number_or_auto(int), "float | str": _number_or_auto(float), "<class 'int'>": int}
    for f in fields(Settings):
        if isinstance(f.default, bool):  # None, not False: whether it was given has to be seen
            one.add_argument("--" + f.name.replace("_", "-"), action="store_true", default=None, help=says[f.name])
        elif str(f.type) == "bool | str":
            one.add_argument("--" + f.name, action=argparse.BooleanOptionalAction, default=None, help=says[f.name])
        elif f.name != "params":
            metavar = {"init_from": "RUN", "weights": "FILE"}.get(f.name, f.name.split("_")[-1].upper())
            default = "" if f.default is None else f" (default {f.default})"
            flag = "--" + f.name.replace("_", "-")
            one.add_argument(
                flag, type=kinds.get(str(f.type), str), metavar=metavar, help=says[f.name].rstrip(".") + default
            )


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of ``fit``: those of --config, over them the flags, over its params those of --set.

    Raises:
        ValueError: --config cannot be read or has an unknown name; --set is not NAME=VALUE.
    """
    found: dict[str, Any] = _config(args.config) if args.config else {}
    found |= {name: value for name in NAMES if (value := getattr(args, name, None)) is not None}
    params = found.setdefault("params", {})
    if not isinstance(params, dict):
        raise ValueError(f"params must be an object of names and values; got {params!r}")
    for pair in args.set:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise ValueError(f"--set takes NAME=VALUE, e.g. --set overcluster=5; got {pair!r}")
        params[name] = _value(value)
    return found


def _config(file: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"cannot read --config {file}: {reason}") from None
    if not isinstance(found, dict):
        raise ValueError(f"--config {file} must hold one JSON object of options; got {json.dumps(found)[:40]}")
    for name in found:
        if name not in NAMES:
            near = get_close_matches(name, NAMES, n=1)
            guess = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(NAMES)}"
            raise ValueError(f"--config {file} has an unknown option {name!r}; {guess}")
    return found


def _value(text: str) -> Any:
    """JSON where it is JSON (3, 0.5, true), else the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
