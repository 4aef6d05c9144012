"""The ratios that the project holds itself to, and where in a run they are read off."""

from __future__ import annotations

from typing import Any, NamedTuple

FAMILY = "numbers"
VOLUME, TWO_SIZES = "volume", "two sizes"
MANY_CHANNELS, ONE_MATRIX = "8x8x8, 512 channels", "one 8 x 64 matrix"
DEPTHWISE = "depthwise convolution"


class Number(NamedTuple):
    """``of`` over ``to``, two contenders of one group; must and aim are bounds from ``sense``'s side."""

    what: str
    label: str
    mode: str
    of: str
    to: str
    sense: str
    must: float
    aim: float | None
    scale: float = 1.0
    per_voxel: bool = False

    def measure(self, records: list[dict[str, Any]]) -> float | None:
        """The ratio of the medians, or None where the run has not both."""
        found = {r["name"]: r for r in records if r["group"] == f"{FAMILY}, {self.label}, {self.mode}"}
        if self.of not in found or self.to not in found:
            return None
        of, to = (
            found[name]["stats"]["median"] / (found[name]["extra_info"]["voxels"] if self.per_voxel else 1)
            for name in (self.of, self.to)
        )
        return self.scale * of / to

    def met(self, value: float, bound: float | None) -> bool:
        return bound is not None and (value <= bound if self.sense == "<=" else value >= bound)


class Kept(Number):
    """What autograd keeps, beside x itself and over x, of the contender ``of``."""

    def measure(self, records: list[dict[str, Any]]) -> float | None:
        group = f"{FAMILY}, {self.label}, {self.mode}"
        for record in records:
            if (record["group"], record["name"]) == (group, self.of):
                return record["extra_info"]["kept_bytes"] / record["extra_info"]["x_bytes"]
        return None


_F, _FB = "forward", "forward+backward"
_ANY_DEVICE = (
    Number("forward, against the reference", VOLUME, _F, "reference", "ours", ">=", 15, 30),
    Number("forward+backward, against the reference", VOLUME, _FB, "reference", "ours", ">=", 15, 30),
    Number("rank 1: 20 iterations over 5", VOLUME, _F, "ours, 20 iterations", "ours", "<=", 1.3, 1.1),
    Kept("kept by autograd, over x", VOLUME, _FB, "ours", "ours", "<=", 0.3, 0.15),
    Number("cost per voxel, 128x128x128 over 32x32x32", TWO_SIZES, _F, "ours", "ours, small", "<=", 1.5, 1.1,
           per_voxel=True),
    *(
        Number(f"{label}: {mode} over the reference", label, mode, "ours", "reference", "<=", 1, None)
        for label in (MANY_CHANNELS, ONE_MATRIX)
        for mode in (_F, _FB)
    ),
)  # fmt: skip

NUMBERS = {
    "cpu": (
        Number("forward over relu", VOLUME, _F, "ours", "relu", "<=", 2, 1.3),
        Number("forward+backward over relu's", VOLUME, _FB, "ours", "relu", "<=", 6, 4),
        Number("depthwise 3x3x3: forward, against torch", DEPTHWISE, _F, "torch", "ours", ">=", 4, 8),
        Number(
            "depthwise 3x3x3: forward+backward, against torch", DEPTHWISE, _FB, "torch", "ours", ">=", 8, 20
        ),
        *_ANY_DEVICE,
    ),
    "cuda": (
        Number("forward over relu", VOLUME, _F, "ours", "relu", "<=", 3, 2),
        Number("forward+backward over relu's", VOLUME, _FB, "ours", "relu", "<=", 5, 2.5),
        # x is read once for each of the two shifts and y written once; a copy reads and writes.
        Number("bandwidth over a copy's", VOLUME, _F, "copy", "ours", ">=", 0.7, 0.9, scale=3 / 2),
        *_ANY_DEVICE,
    ),
}
