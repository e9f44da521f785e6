"""Weights from a file into a network. Nothing in the file is executed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepcluster import foreign, onnxnet

WRAPS = ("state_dict", "model", "model_state_dict", "teacher")  # where training scripts put them
PREFIXES = (
    "module.",
    "_orig_mod.",
    "backbone.1.",
    "backbone.network.1.",
)  # of DistributedDataParallel, torch.compile and our own models


def load_weights(backbone: nn.Module, file: str | Path, name: str = "") -> None:
    """Fill a backbone made by ``make_backbone`` from a local .safetensors, .pt, .pth or .onnx file; executes nothing.

    The file may hold more (a classifier), be wrapped in a training checkpoint, and its names may begin with one of
    PREFIXES. ``name`` of the backbone, for the error.

    Raises:
        ValueError: no such file, not a weight file, or it does not fit.
    """
    path = Path(file)
    check_file(path, name)
    net = backbone[-1] if isinstance(backbone, nn.Sequential) else backbone
    if path.suffix == ".onnx":
        if not isinstance(net, onnxnet.OnnxNet):
            raise ValueError(f"{path} is a network of its own; give --backbone {path} without --weights")
        net.load_state_dict(onnxnet.read(path).state_dict())
        return
    saved = _plain(read(path))
    if isinstance(net, foreign.Pooled) and not saved.keys() & net.state_dict().keys():
        net = net.net  # not of one of our models
    own = net.state_dict()
    if isinstance(net, onnxnet.OnnxNet):
        own = saved = {"model": saved.get("model", torch.zeros(0))}  # of any length
    fitting = {k: v for k, v in saved.items() if k in own and isinstance(v, Tensor) and v.shape == own[k].shape}
    # torchvision's older files do not count batches; BatchNorm then keeps its own count
    missing = [k for k in own if k not in fitting and not k.endswith("num_batches_tracked")]
    if missing:
        raise ValueError(
            f"{path} does not fit this backbone: {len(missing)} of {len(own)} tensors, e.g. {missing[0]}, which "
            f"{_how(saved.get(missing[0]), own[missing[0]])}; {_remedy(saved, own, name)}"
        )
    net.load_state_dict(fitting)


def check_file(path: Path, name: str = "") -> None:
    """Make sure that there is a weight file.

    Raises:
        ValueError: there is none; says where to get it for the backbone ``name``, if that is known.
    """
    if not path.is_file():
        if source := _source(name):
            raise ValueError(f"no weight file {path}; get {source} and put it there: nothing is downloaded")
        raise ValueError(f"no weight file {path}; give a .safetensors or .pth file that is on this machine")


def _source(name: str) -> str:
    """Where weights of torchvision's and timm's networks lie."""
    space, _, rest = name.rpartition(":")
    if space in ("", "torchvision"):
        from torchvision import models

        if rest in models.list_models(module=models):
            return models.get_model_weights(rest)["DEFAULT"].url
    if space == "timm":
        try:
            import timm

            cfg = timm.get_pretrained_cfg(rest, allow_unregistered=True)
        except ImportError:
            cfg = None
        if cfg and cfg.hf_hub_id:
            return f"https://huggingface.co/{cfg.hf_hub_id}/resolve/main/model.safetensors"
    return ""


def read(path: Path) -> dict[str, Any]:
    """What a weight file holds.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # both formats raise many kinds on damaged bytes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read weights from {path}: {reason}") from error


def _plain(saved: dict[str, Any]) -> dict[str, Any]:
    """Tensors by their name in the network: out of their wraps, without prefixes."""
    for wrap in WRAPS:
        if isinstance(saved.get(wrap), Mapping):
            saved = dict(saved[wrap])
    names = {}
    for name, value in saved.items():
        for prefix in PREFIXES:
            name = str(name).removeprefix(prefix)
        names[name] = value
    return names


def _how(saved: Any, own: Tensor) -> str:
    shapes = ["x".join(map(str, one.shape)) for one in (saved, own) if isinstance(one, Tensor)]
    return f"is {shapes[0]} in it and {shapes[1]} here" if len(shapes) == 2 else "it lacks"


def _remedy(saved: dict[str, Any], own: dict[str, Tensor], name: str) -> str:
    stem, here = saved.get("conv1.weight"), own.get("conv1.weight")
    if isinstance(stem, Tensor) and here is not None and stem.shape[-1] == 7 and here.shape[-1] == 3:
        return "below 64 px our ResNets begin without stride: add --image-size 64 or more (224 is usual)"
    return f"give weights of {name}, or the --backbone they are of" if name else "give the --backbone it is of"
