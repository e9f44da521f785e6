"""What lies in a run, a model or a data set may be from a stranger: looked at here before anything is made of it.

Types, so that no text stands where a number is expected (in a page, in a path), and sizes against the file they are
claimed in, before memory is taken for them. All errors are ValueErrors of one line.
"""

import contextlib
import json
import tokenize
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

Made = TypeVar("Made", bound=nn.Module)
LARGEST = 4096  # pixels of a side that a network sees
DENSE = 8  # rows a byte of a Parquet file at most: a few bytes can stand for any number of equal rows
IDS = 2**24  # clusters
MOMENTS = ({"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"})  # what Adam and SGD remember of a parameter
LINKED = ("model", "checkpoints", "train.log")  # of a run: written to, so a link could lead the writing elsewhere

whole, number, none, words = (int,), (int, float), (type(None),), (str,)
DATA: dict[str, tuple[type, ...]] = {
    "source": words, "data_root": words + none, "labels": words, "size": (list,), "cwd": words, "n_images": whole,
    "content": words, "signature": words, "launch": words, "use_labels": (bool,), "n_labelled": whole,
    "labels_sha1": words, "feature_names": (list,), "chosen": (list,),
}  # fmt: skip
PLAN: dict[str, tuple[type, ...]] = {
    "stages": (list,), "n_clusters": whole, "backbone": words, "weights": words + none, "init_from": words + none,
    "shape": (list,), "seed": whole, "bf16": (bool,), "on_collapse": words, "checkpoint_every": words,
    "auto_k": (bool,),
}  # fmt: skip
CHOSEN: dict[str, tuple[type, ...]] = {
    "method": words, "consistency": number, "stability": number + none, "score": number, "seconds": number,
}  # fmt: skip
STAGE: dict[str, tuple[type, ...]] = {
    "method": words, "params": (dict,), "epochs": whole, "batch_size": whole, "lr": number, "momentum": number + none,
    "weight_decay": number,
}  # fmt: skip
EPOCH: dict[str, tuple[type, ...]] = {
    "stage": whole, "epoch": whole, "loss": number + none, "seconds": number + none, "acc": number + none,
    "health": (dict, *none),
}  # fmt: skip
HEALTH: dict[str, tuple[type, ...]] = {"active": number + none, "nmi_previous": number + none}
STRINGS = (pa.string(), pa.large_string())
COLUMNS: dict[str, Callable[[pa.DataType], bool]] = {
    **dict.fromkeys(("id", "size", "cluster", "second"), pa.types.is_integer),
    **dict.fromkeys(("probability", "confidence", "margin", "distance"), pa.types.is_floating),
    **dict.fromkeys(("cohesion", "separation"), pa.types.is_floating),
    **dict.fromkeys(("is_outlier", "is_junk", "is_representative", "given"), pa.types.is_boolean),
    **dict.fromkeys(("path", "sha1", "name", "look", "reason", "duplicate_of"), lambda of: of in STRINGS),
}
MAY_LACK = ("cohesion", "separation", "name", "look", "reason", "duplicate_of")  # values, or all of them


def version(found: Any, known: int) -> dict[str, Any]:
    """A JSON object, if its format is one that this version knows."""
    typed(found, {"format": whole}, "it")
    if found.get("format", 1) > known:
        raise ValueError(f"it has format {found['format']}, this version reads {known}; upgrade deepcluster")
    return found


def typed(found: Any, kinds: Mapping[str, tuple[type, ...]], what: str) -> None:
    """Make sure that ``found`` is a JSON object whose fields are of these kinds where it has them."""
    if not isinstance(found, dict):
        raise ValueError(f"{what} must be an object; got {type(found).__name__}")
    for name, allowed in kinds.items():
        if name not in found:
            continue
        value = found[name]
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise ValueError(f"{what}.{name} must be {' or '.join(kind.__name__ for kind in allowed)}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"{what}.{name} is too large")


def shape(found: Any) -> tuple[int, ...]:
    """(C, H, W) of images, square and of at most LARGEST pixels a side, or (D,) of vectors."""
    sides = tuple(found) if isinstance(found, list | tuple) else ()
    plain = all(type(side) is int and side > 0 for side in sides)
    images = plain and len(sides) == 3 and sides[0] <= 4 and sides[1] == sides[2] <= LARGEST
    if not images and not (plain and len(sides) == 1):
        raise ValueError(f"no shape of images up to {LARGEST} pixels a side, or of vectors: {str(found)[:60]}")
    return sides


def config(found: dict[str, Any]) -> None:
    """``data`` and ``plan`` of a run's config.json."""
    data, plan = found["data"], found["plan"]
    typed(data, DATA, "data")
    typed(plan, PLAN, "plan")
    for one in data.get("chosen", []):
        typed(one, CHOSEN, "data.chosen")
        if lacking := CHOSEN.keys() - one.keys():
            raise ValueError(f"data.chosen has no {min(lacking)}")
    for stage in plan["stages"]:
        typed(stage, STAGE, "plan.stages")
    shape(plan["shape"])
    size = data["size"]
    if len(size) != 2 or not all(type(one) is int and one > 0 for one in size) or size[0] > LARGEST:
        raise ValueError(f"data.size must be a side of at most {LARGEST} pixels, and channels; got {str(size)[:60]}")


def epoch(found: Any) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    typed(found, EPOCH, "a line")
    typed(found.get("health") or {}, HEALTH, "health")
    return found


def rows(metadata: Any, size: int) -> list[int]:
    """Rows of each row group of a Parquet file of ``size`` bytes, by its metadata."""
    found = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if metadata.num_rows > DENSE * size:
        raise ValueError(f"{metadata.num_rows} rows in {size} bytes hold nothing")
    if min(found, default=0) < 0 or sum(found) != metadata.num_rows:
        raise ValueError("its row groups do not add up")
    return found


def array(file: str | Path) -> np.ndarray:
    """The array in a .npy file, memory-mapped.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    try:
        return np.lib.format.open_memmap(file, mode="r")  # np.load would take a zip, too
    except (EOFError, OverflowError, TypeError, SyntaxError, tokenize.TokenError) as error:  # its header is Python
        raise ValueError(" ".join(str(error).split())[:120] or "its header is damaged") from None


def table(found: pa.Table, required: tuple[str, ...]) -> pa.Table:
    """A table of a run, if its columns are what their names say."""
    if missing := [name for name in required if name not in found.column_names]:
        raise ValueError(f"it has no column {missing[0]!r}")
    if len(set(found.column_names)) < found.num_columns:
        raise ValueError("two of its columns have one name")
    for name in found.column_names:
        column, lacks = found[name], name in MAY_LACK
        if name in COLUMNS and not COLUMNS[name](column.type) and not (lacks and pa.types.is_null(column.type)):
            raise ValueError(f"its column {name!r} is of type {str(column.type)[:40]}")
        if name in COLUMNS and column.null_count and not lacks:
            raise ValueError(f"its column {name!r} lacks values")
        ids = column.to_numpy() if name in ("id", "cluster") and len(column) else np.zeros(1)
        if not 0 <= ids.min() <= ids.max() < IDS:
            raise ValueError(f"its column {name!r} has values that are no clusters")
    return found


def moments(found: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer of the same parameters, with its own options: a fused step trusts what it is given."""
    own = optimizer.state_dict()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for i, state in found["state"].items():
        if type(i) is not int or not 0 <= i < len(params) or set(state) not in MOMENTS:
            raise ValueError(f"its optimizer remembers {str([*state])[:60]} of parameter {str(i)[:20]}")
        for name, one in state.items():
            if one is None and name == "momentum_buffer":
                continue
            like = torch.Size() if name == "step" else params[i].shape
            kind = (one.layout, one.dtype, one.shape) if isinstance(one, Tensor) else ()
            if kind != (torch.strided, torch.float32, like):
                raise ValueError(f"its optimizer has a {name} of parameter {i} that is not its shape")
    return {**own, "state": found["state"]}


def targets(labels: Tensor, partners: Tensor, like: Tensor, widths: Sequence[int]) -> None:
    """Labels as ``like``, (H, N) below the ``widths`` of H heads, -1 for none; partners (N, P) of N images."""
    n = like.shape[1]
    if labels.shape != like.shape or partners.ndim != 2 or len(partners) != n:
        raise ValueError(f"it labels {len(partners)} images instead of {n}")
    if labels.dtype != torch.int32 or partners.dtype != torch.int64:
        raise ValueError(f"its labels and partners are {labels.dtype} and {partners.dtype}")
    beyond = any(not -1 <= int(own.min()) <= int(own.max()) < k for own, k in zip(labels, widths, strict=True))
    if beyond or (partners.numel() and not 0 <= int(partners.min()) <= int(partners.max()) < n):
        raise ValueError("it has labels or partners that there are none of")


def seen(weights: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Room for a mean and a deviation of each channel that a model sees: three of grey images, if it was pretrained."""
    mean = weights["backbone.network.0.mean" if "backbone.network.0.mean" in weights else "backbone.0.mean"]
    colour = shape[0] == 1 and mean.shape == (3,)
    return torch.zeros(3 if colour else shape[0]), torch.ones(3 if colour else shape[0])


def built(file: Path, n_clusters: Any, build: Callable[[], Made]) -> Made:
    """What ``build`` makes, a model of ``n_clusters`` outputs, unless it takes more memory than its weights' file."""
    size = file.stat().st_size
    with file.open("rb") as stored:  # not by safe_open, which takes no path that is not UTF-8
        order = json.loads(stored.read(min(int.from_bytes(stored.read(8), "little"), size)))["order"]["shape"]
    if type(n_clusters) is not int or order != [n_clusters]:
        raise ValueError(f"config.json says {str(n_clusters)[:40]} clusters, model.safetensors has {order}")
    need = 0
    with contextlib.suppress(RuntimeError, NotImplementedError), torch.device("meta"):  # takes no memory
        need = sum(one.nbytes for one in build().state_dict().values())  # few networks cannot be built so
    if need > size:
        raise ValueError(f"config.json describes {need} bytes of weights, model.safetensors has {size}")
    return build()
