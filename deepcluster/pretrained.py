"""Networks that somebody else trained: where they come from, the size they want images at, how these are normalised.

Names: ``torchvision:NAME``, ``timm:NAME`` with a weight file; ``efficientnet-lite0`` from its packages;
``package.module:function``; ``hub:REPO_OR_DIR/NAME``; ``FILE.safetensors`` and ``FILE.onnx``, which ``resolve`` turns
into a name that needs no file. Nothing is fetched from a network.
"""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepcluster import foreign, onnxnet, trust
from deepcluster.foreign import LITE

OURS = ("resnet18", "resnet34", "resnet50")  # torchvision's, under their plain names


class Facts(NamedTuple):
    """What a backbone was trained with: pixels a side; mean and deviation of each channel of images in [0, 1]."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Facts(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GREY = Facts(224, (0.449,), (0.226,))  # ImageNet's, averaged
LITE_FACTS = Facts(224, (127 / 255,) * 3, (128 / 255,) * 3)


def is_own(name: str) -> bool:
    """Whether ``name`` stands for a network that comes with its weights."""
    return (
        name == LITE
        or name.startswith("onnx:")
        or Path(name).suffix in (".onnx", ".safetensors")
        or trust.is_code(name)
    )


def brings(name: str, weights: str | None) -> bool:
    """Whether a backbone is trained before we begin: by its name, or by a weight file."""
    return is_own(name) or bool(weights)


def resolve(name: str, weights: str | None = None) -> tuple[str, str | None]:
    """The backbone and the weight file that ``FILE.safetensors`` or ``FILE.onnx`` stand for; others as they are.

    Raises:
        ValueError: no such file; or nothing beside it says which network it is of.
    """
    path = Path(name)
    if path.suffix not in (".onnx", ".safetensors"):
        if name.startswith("hub:") and (folder := Path(name[4:]).parent).is_dir():
            name = f"hub:{(folder.resolve() / Path(name).name).as_posix()}"
        return name, weights
    if weights:
        raise ValueError(f"--backbone {name} is a weight file, and so is --weights {weights}; give one of them")
    if not path.is_file():
        raise ValueError(f"no file {path}; give --backbone a .safetensors or .onnx file that is on this machine")
    if path.suffix == ".onnx":
        return f"onnx:{onnxnet.read(path).dim}", name
    config = beside(path)
    if isinstance(named := config.get("backbone"), str) and Path(named).suffix not in (".onnx", ".safetensors"):
        return named, name
    if isinstance(config.get("architecture"), str):
        return f"timm:{config['architecture']}", name
    raise ValueError(f"nothing beside {path} says which network it is of; give --backbone NAME --weights {path}")


def beside(weights: str | Path) -> dict[str, Any]:
    """The config.json next to a .safetensors file: of one of our models, or of timm's; {} if there is none."""
    path = Path(weights)
    try:
        found = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and path.suffix == ".safetensors" else {}


def facts(name: str, weights: str | None = None) -> Facts | None:
    """Size and normalisation that come with a backbone, by its name and by what lies beside its weight file.

    None where nothing is known: our own networks take any images, normalised by their own statistics.

    Raises:
        ValueError: it cannot be made.
    """
    if found := _facts_beside(weights or name):
        return found
    if Path(name).suffix == ".onnx" or name.startswith("onnx:"):
        file = Path(weights or name)
        net = onnxnet.read(file) if file.is_file() else onnxnet.OnnxNet()
        return (IMAGENET if net.channels == 3 else GREY)._replace(size=net.size or IMAGENET.size)
    name = resolve(name, weights)[0]
    if name == LITE:
        return LITE_FACTS
    space, _, rest = name.partition(":")
    if trust.is_code(name):
        return _facts_of_code(name)
    if space == "timm":
        return _facts_of_timm(rest)
    return _facts_of_torchvision(rest if space == "torchvision" else name if name in OURS else "")


def size(name: str, weights: str | None) -> int | None:
    """Pixels a side that a pretrained backbone was trained with; None for others. Raises as ``facts``."""
    found = facts(name, weights) if brings(name, weights) else None
    return found and found.size


def _facts_beside(weights: str) -> Facts | None:
    if Path(weights).suffix != ".safetensors":
        return None
    config = beside(weights)
    try:
        if isinstance(config.get("backbone"), str):
            from safetensors import safe_open

            with safe_open(weights, "pt") as file:
                at = "backbone.0." if "backbone.0.mean" in file.keys() else "backbone.network.0."  # noqa: SIM118
                mean, std = (file.get_tensor(at + which).tolist() for which in ("mean", "std"))
            return Facts(int(config["shape"][-1]), tuple(mean), tuple(std))
        cfg = config.get("pretrained_cfg") or {}
        return _from_cfg(cfg) if "input_size" in cfg else None
    except Exception:  # damaged, or of another make: said when it is loaded
        return None


def _from_cfg(cfg: Any) -> Facts:
    """Of timm's description of a network, a dictionary or an object."""
    get = cfg.get if isinstance(cfg, dict) else lambda key, other=None: getattr(cfg, key, other)
    size = get("input_size") or (3, IMAGENET.size, IMAGENET.size)
    size = int(size if isinstance(size, int) else size[-1])
    return Facts(size, tuple(get("mean") or IMAGENET.mean), tuple(get("std") or IMAGENET.std))


def _facts_of_torchvision(name: str) -> Facts | None:
    from torchvision import models

    if name not in models.list_models(module=models):
        return None
    shown = models.get_model_weights(name)["DEFAULT"].transforms()
    return Facts(int(shown.crop_size[-1]), tuple(shown.mean), tuple(shown.std))


def _facts_of_timm(name: str) -> Facts | None:
    try:
        import timm
    except ImportError:
        return None
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return _from_cfg(cfg) if cfg else None


@functools.lru_cache(maxsize=8)
def _facts_of_code(name: str) -> Facts:
    net = foreign.make(name, (3, IMAGENET.size, IMAGENET.size), follows=True)
    if any(hasattr(net, key) for key in ("input_size", "mean", "std")):
        return _from_cfg(net)
    for module in net.modules():
        if cfg := getattr(module, "default_cfg", None):
            return _from_cfg(cfg)
        known = getattr(module, "_global_params", None)  # of the EfficientNets in PyTorch that TensorFlow's became
        if isinstance(size := getattr(known, "image_size", None), int):
            return (LITE_FACTS if getattr(known, "fix_head_stem", False) else IMAGENET)._replace(size=size)
    return IMAGENET


def given(name: str) -> None:
    """The user gave this name in this process, so the code behind it may be run."""
    if trust.is_code(name):
        trust.trust(name)
        trust.trust(resolve(name)[0])


def normalisation(name: str, weights: str | None, shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation, each (C,), that a pretrained backbone wants its images with; grey ones it sees as colour.

    None where they are the data's to say.

    Raises:
        ValueError: it cannot be made, or takes images of other channels.
    """
    found = facts(name, weights) if brings(name, weights) and len(shape) == 3 else None
    if found is None:
        return None
    if shape[0] not in (1, len(found.mean)):
        raise ValueError(f"{name} takes images of {len(found.mean)} channels; these have {shape[0]}")
    return torch.tensor(found.mean), torch.tensor(found.std)


def came_with(name: str, mean: Tensor) -> bool:
    """Whether a trained backbone normalises by what it came with, not by the statistics of its run's images."""
    if is_own(name):
        return True
    found = facts(name)
    return found is not None and len(found.mean) == len(mean) and torch.equal(torch.tensor(found.mean), mean.cpu())
