"""A network moved over a volume in windows, whose result is had plane by plane."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map
from torch import Tensor

OVERLAP = 0.5  # of neighbouring windows, in each axis


class Planes:
    """Values (n, X, Y, Z) of which a few planes exist at a time: they are computed as they are asked for.

    Args:
        chunks: the values, cut along the axis (0, 1 or 2), from its begin to its end.
    """

    def __init__(self, chunks: Iterator[Tensor], axis: int) -> None:
        self._chunks, self._dim, self._begin = chunks, axis + 1, 0
        self._kept: Tensor | None = None

    def take(self, begin: int, end: int) -> Tensor:
        """The planes from begin to end. No later call asks for any before these."""
        while self._kept is None or self._begin + self._kept.shape[self._dim] < end:
            chunk = next(self._chunks)
            self._kept = chunk if self._kept is None else torch.cat([self._from(begin), chunk], self._dim)
        self._kept = self._from(begin)
        return self._kept.narrow(self._dim, begin - self._begin, end - begin)

    def _from(self, begin: int) -> Tensor:
        """What is kept without the planes before this one, as far as there are such."""
        assert self._kept is not None
        skipped = min(max(begin - self._begin, 0), self._kept.shape[self._dim])
        self._begin += skipped
        kept = self._kept.narrow(self._dim, skipped, self._kept.shape[self._dim] - skipped)
        return kept.clone() if 2 * skipped > self._kept.shape[self._dim] else kept


def slide(
    network: Callable[[Tensor], Tensor],
    image: Tensor,
    window: Sequence[int],
    *,
    axis: int,
    batch_size: int = 1,
) -> Iterator[Tensor]:
    """The network on windows of an image that overlap by half, averaged by Gaussian weights.

    The same as MONAI's `SlidingWindowInferer`, but that only the planes exist which the window now touches.

    Args:
        network: (B, C, *window) to (B, n, *window), on the CPU.
        image: (C, X, Y, Z). Where it is smaller than the window zeros surround it.
        window: its extent along each axis.
        axis: along which the result is cut.
        batch_size: windows that the network gets at a time.

    Yields:
        (n, X, Y, Z) from the axis' begin to its end, cut there.
    """
    size, missing = image.shape[1:], [max(w - s, 0) for w, s in zip(window, image.shape[1:], strict=True)]
    before = [m // 2 for m in missing]
    if any(missing):
        sides = zip(reversed(before), reversed(missing), strict=True)
        image = F.pad(image, [n for first, both in sides for n in (first, both - first)])
    starts = [_starts(s, w) for s, w in zip(image.shape[1:], window, strict=True)]
    weight = compute_importance_map(tuple(window), mode="gaussian", sigma_scale=0.125).float()
    dim, thickness = axis + 1, window[axis]
    across = [place if k != axis else [0] for k, place in enumerate(starts)]
    sums: Tensor | None = None
    for number, begin in enumerate(starts[axis]):
        end = starts[axis][number + 1] if number + 1 < len(starts[axis]) else begin + thickness
        for corners in _batches(list(itertools.product(*across)), batch_size):
            places = [
                (slice(None), *(slice(c, c + w) for c, w in zip(corner, window, strict=True)))
                for corner in corners
            ]
            part = image.narrow(dim, begin, thickness)
            values = network(torch.stack([part[place] for place in places]))
            if sums is None:
                shape = [thickness if k == axis else s for k, s in enumerate(image.shape[1:])]
                sums, weights = values.new_zeros(values.shape[1], *shape), values.new_zeros(1, *shape)
            for place, value in zip(places, values, strict=True):
                sums[place] += value * weight
                weights[place] += weight
            del value, values  # before the next windows, among whose maps they would lie
        assert sums is not None
        finished = sums.narrow(dim, 0, end - begin) / weights.narrow(dim, 0, end - begin)
        # Without the zeros that were added; and the rest makes place for the next windows.
        for k, (first, length) in enumerate(zip(before, size, strict=True)):
            if missing[k]:
                finished = finished.narrow(k + 1, first, length)
        yield finished
        del finished
        for kept in (sums, weights):
            left = thickness - (end - begin)
            kept.narrow(dim, 0, left).copy_(kept.narrow(dim, end - begin, left).clone())
            kept.narrow(dim, left, end - begin).zero_()


def _starts(size: int, window: int) -> list[int]:
    """Where windows begin that cover an axis of that size; the last one is moved back to its end."""
    step = max(int(window * (1 - OVERLAP)), 1)
    return sorted({min(start, size - window) for start in range(0, size - window + step, step)})


def _batches(items: list, size: int) -> Iterator[list]:
    return (items[k : k + size] for k in range(0, len(items), size))


def mirrored(network: Callable[[Tensor], Tensor], axes: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """The network averaged over the mirror images of x (B, C, X, Y, Z) along every choice of these axes."""
    flips = [[a + 2 for a in f] for n in range(len(axes) + 1) for f in itertools.combinations(axes, n)]

    def mean(x: Tensor) -> Tensor:
        total = network(x)
        for flip in flips[1:]:
            total = total + network(x.flip(flip)).flip(flip)
        return total / len(flips)

    return mean
