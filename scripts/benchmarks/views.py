"""Random views of a batch."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from benchmarks.common import CPU, Case, finished, rates, within
from deepcluster.views import VIEWS

BATCH = 256
LARGE = 4096  # on a GPU, where 256 images of 32 px are too few to keep it busy
Batched = Callable[[Tensor], Tensor]


def views(device: torch.device = CPU) -> Iterator[Case]:
    """A view of 256 uint8 images as float ones in [0, 1], beside torchvision v2 and kornia.

    ``crop`` of colour images: a crop of 20 to 100 % of the area resized bilinearly to the image's size, a mirror image
    for half of them, brightness, contrast, saturation and hue for 80 %, grey for 20 %. ``strong`` of grey ones:
    rotation, zoom and shift bilinearly, brightness and contrast. The same distributions everywhere. What differs: ours
    turns the hue in YIQ, both peers in HSV, with a clamp after each colour part; torchvision has no border padding.

    torchvision        each image by itself, its numbers its own, as in a DataLoader's process; then stacked
    torchvision-batch  one draw for the whole batch, which is another thing: without a goal
    kornia             the whole batch, every image its own numbers, as ours

    Of each peer's forms (uint8 or float in; kornia's croppings, its own container or PyTorch's) the quickest counts.
    """
    torch.set_num_threads(1)
    for name, channels in (("crop", 3), ("strong", 1)):
        for side in (32, 96):
            images = torch.randint(256, (BATCH, channels, side, side), dtype=torch.uint8, device=device)
            rng = torch.Generator().manual_seed(0)
            times = 4 if side == 32 else 1  # as long a round for either size

            def ours(images: Tensor = images, name: str = name, rng: torch.Generator = rng, n: int = times) -> None:
                for _ in range(n):
                    VIEWS[name](images, rng)

            for peer, forms in (*torchvision_forms(name, side, device), *kornia_forms(name, side)):
                batched = min(forms, key=lambda form: seconds(form, images, device))

                def theirs(images: Tensor = images, batched: Batched = batched, n: int = times) -> None:
                    with torch.no_grad():
                        for _ in range(n):
                            batched(images)

                yield rates(f"{name} {channels}x{side}x{side}", peer, times * BATCH, ours, theirs, device=device)
    if device.type == "cuda":
        images = torch.randint(256, (LARGE, 3, 32, 32), dtype=torch.uint8, device=device)
        rng = torch.Generator().manual_seed(0)
        each = seconds(lambda images: VIEWS["crop"](images, rng), images, device, 50) / LARGE
        yield within(f"crop 3x32x32, {LARGE} at once", 1e6 * each, 0.5, "us an image", 50)


def seconds(batched: Batched, images: Tensor, device: torch.device, n: int = 3) -> float:
    """The median of ``n`` calls, after one that is not counted."""
    taken = []
    with torch.no_grad():
        for _ in range(n + 1):
            finished(device)
            began = time.perf_counter()
            batched(images)
            finished(device)
            taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def torchvision_forms(name: str, side: int, device: torch.device) -> Iterator[tuple[str, list[Batched]]]:
    """Its peer names and what may be compared under them."""
    floats = v2.ToDtype(torch.float32, scale=True)
    if name == "crop":  # it never shrinks, so antialiasing changes nothing; with it torchvision is quicker
        steps = [
            v2.RandomResizedCrop(side, (0.2, 1), (3 / 4, 4 / 3), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
        ]
    else:
        steps = [
            v2.RandomAffine(20, (0.125, 0.125), (0.85, 1.15), interpolation=InterpolationMode.BILINEAR),
            v2.ColorJitter(0.4, 0.4),
        ]
    transform = v2.Compose(steps)
    if device.type == "cpu":  # image by image is not how anybody uses a GPU
        yield "torchvision", [lambda x: floats(each(transform, x)), lambda x: each(transform, floats(x))]
    yield "torchvision-batch", [lambda x: floats(transform(x)), lambda x: transform(floats(x))]


def each(transform: Batched, images: Tensor) -> Tensor:
    """Every image by itself, then all stacked."""
    return torch.stack([transform(image) for image in images])


def kornia_forms(name: str, side: int) -> Iterator[tuple[str, list[Batched]]]:
    """The same for kornia, if it is installed."""
    try:
        import kornia.augmentation as K
    except ImportError:
        print("kornia is not installed, so views are not measured beside it: pip install kornia", file=sys.stderr)
        return
    pixels = (side, side)
    forms: list[Batched] = []
    for container in (torch.nn.Sequential, K.AugmentationSequential):
        for cropping in ("slice", "resample") if name == "crop" else (None,):
            if cropping:
                crop = K.RandomResizedCrop(pixels, (0.2, 1.0), (3 / 4, 4 / 3), cropping_mode=cropping)
                colour = K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)
                steps = [crop, K.RandomHorizontalFlip(), colour, K.RandomGrayscale(p=0.2)]
            else:
                affine = K.RandomAffine(20.0, (0.125, 0.125), (0.85, 1.15), padding_mode="border", p=1.0)
                steps = [affine, K.ColorJitter(0.4, 0.4, p=1.0)]
            forms.append(from_bytes(container(*steps)))
    yield "kornia", forms


def from_bytes(transform: Batched) -> Batched:
    """The same of uint8 images."""
    return lambda images: transform(images.float() / 255)
