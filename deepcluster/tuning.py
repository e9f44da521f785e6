"""How much of a pretrained backbone is trained: nothing, its last blocks, or all."""

from torch import nn

from deepcluster import pretrained


def frozen(
    asked: bool | str, tune_last: int, backbone: str, weights: str | None, init_from: str | None, shape: tuple[int, ...]
) -> bool:
    """Whether a run leaves its backbone as it is: as ``asked``, by default where that comes pretrained.

    Raises:
        ValueError: there is nothing worth keeping: vectors, or a backbone that has learnt nothing yet.
    """
    brings = pretrained.brings(backbone, weights)
    if backbone.startswith("onnx:") and (tune_last or asked is False):
        raise ValueError("a network in an ONNX file cannot be trained; leave --tune-last and --no-frozen out")
    if not tune_last and asked is not True:
        return asked != False and brings and len(shape) == 3  # noqa: E712  (it may be "auto")
    what = f"--tune-last {tune_last}" if tune_last else "--frozen"
    if len(shape) == 1:
        raise ValueError(f"{what} is for images; the source holds vectors, clustered as they are: leave it out")
    if not (brings or init_from):
        raise ValueError(
            f"{what} keeps what a backbone has learnt, and {backbone} has learnt nothing yet; give --weights FILE, "
            "--init-from RUN, or a --backbone that comes with weights"
        )
    return not tune_last


class Tuned(nn.Sequential):
    """A backbone of which only some blocks are trained; the others stay as they are, statistics of norms included."""

    def __init__(self, backbone: nn.Sequential, fixed: list[nn.Module], trained: list[nn.Module]):
        super().__init__(*backbone)
        self.fixed = tuple(fixed)  # no list of modules: they are named already
        self.requires_grad_(False)
        for block in trained:
            block.requires_grad_(True)

    def train(self, mode: bool = True) -> "Tuned":
        """Fixed blocks stay in evaluation mode."""
        super().train(mode)
        for block in self.fixed:
            block.eval()
        return self


def tuned(backbone: nn.Module, last: int) -> Tuned:
    """The backbone with all fixed but its ``last`` blocks and what follows these.

    Blocks are the parts that a network is a sequence of, those with weights: parameters of two dimensions or more.

    Raises:
        ValueError: it has fewer blocks.
    """
    assert isinstance(backbone, nn.Sequential)
    parts = _parts_of(backbone[-1])
    weighty = [i for i, part in enumerate(parts) if any(p.ndim > 1 for p in part.parameters())]
    if last > len(weighty):
        raise ValueError(f"--tune-last {last}: the backbone has {len(weighty)} blocks; give at most so many")
    return Tuned(backbone, parts[: weighty[-last]], parts[weighty[-last] :])


def _parts_of(network: nn.Module) -> list[nn.Module]:
    """What a network is made of, in order: sequences and lists are opened, blocks are not."""
    children = list(network.children())
    with_weights = [child for child in children if any(True for _ in child.parameters())]
    if len(with_weights) == 1 and list(with_weights[0].children()):  # a shell around the network
        return _parts_of(with_weights[0])
    opened = (nn.Sequential, nn.ModuleList)
    return [part for c in children for part in (_parts_of(c) if isinstance(c, opened) else [c])] or [network]
