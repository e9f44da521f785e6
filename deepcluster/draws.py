"""Random numbers of a batch that are the same however many processes share it."""

from collections.abc import Callable

import torch
from torch import Tensor

Range = tuple[float, float]


class Draws:
    """Random numbers for rows start..start+B of a global batch of ``total``, the same however the batch is split.

    All ``total`` rows are drawn on the CPU, then ours are kept. ``rng`` gives one seed, at the first draw, so it
    advances by the same amount whatever is drawn here, and not at all if nothing is.
    """

    def __init__(self, rng: torch.Generator, start: int, n: int, total: int) -> None:
        self.rng, self.ours, self.n, self.total = rng, slice(start, start + n), n, total
        self.own: torch.Generator | None = None

    def table(self, fill: Callable[..., Tensor], *shape: int) -> Tensor:
        """Numbers of this shape for all processes alike, by torch.rand or torch.randn."""
        if self.own is None:
            self.own = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=self.rng)))
        return fill(*shape, generator=self.own)

    def uniform(self, *ranges: Range) -> Tensor:
        """(R, B) float32, row r in [low, high] of range r; drawn only if they differ, one row after the other."""
        random = [row for row, (low, high) in enumerate(ranges) if low != high]
        table = torch.zeros(len(ranges), self.n)
        if random:
            table[random] = self.table(torch.rand, len(random), self.total)[:, self.ours]
        lows, spans = torch.tensor([(low, high - low) for low, high in ranges]).view(-1, 2, 1).unbind(1)
        return table * spans + lows

    def chance(self, probability: float) -> Tensor:
        """(B,) bool, true with this probability; drawn only if there is a doubt."""
        if probability in (0, 1):
            return torch.full((self.n,), bool(probability))
        return self.table(torch.rand, self.total)[self.ours] < probability
