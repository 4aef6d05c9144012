"""The training recipe: every number of it, and of the planning that goes before, in one place.

A `Plan` holds its `Recipe`, so two runs with equal plans train the same network. A new number becomes a
field whose default is what runs did before it existed, such as a probability of 0: a plan that was
written without the field then reads as the recipe that it was trained by. What `plan_run` gives to new
plans is `RECIPE`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from factorizer.segmentation.errors import DataError

# Arguments of `build_network` for new plans, beside channels and size.
WIDTH, STRIDES, PATCH = (24, 48, 96), (1, 2, 2), 4
NETWORK: dict[str, Any] = {
    "encoder_depth": (1,) * len(WIDTH),
    "encoder_width": WIDTH,
    "strides": STRIDES,
    "decoder_depth": (1,) * (len(WIDTH) - 1),
    "norm": "LayerNorm",
    "reshape": ("SWMatricize", {"head_dim": 8, "patch_size": PATCH, "shifts": (None, PATCH // 2)}),
    "act": "ReLU",
    "factorize": "NMF",
    "rank": 1,
    "num_iters": 5,
    "mlp_ratio": 2,
}
DIVISOR = PATCH * math.prod(STRIDES)  # a crop is a whole number of windows in the deepest stage
MAX_CROP_VOXELS = 64**3
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 2, 5e-3, 1e-2
ROUNDS, MIN_STEPS, MAX_STEPS = 10, 300, 1000  # training sees the voxels of its volumes so many times
RANGE_QUANTILES = (0.005, 0.995)  # of the labelled voxels' intensities, which CT is clipped to


@dataclass(frozen=True)
class Recipe:
    """How crops are drawn and changed, what is minimised, and how.

    Probabilities are those of a crop; intensities are those of the preprocessed image.

    Attributes:
        balanced: whether the middle of a crop is a voxel of a class that is drawn first, all classes being
            equally likely; otherwise crops lie anywhere.
        class_voxels: voxels of each class and volume, at most, that middles are drawn from.
        affine_prob, rotation, scaling, padding: an affine map by up to so many degrees about each axis and
            up to this share along it; "border" or "zeros" outside the crop.
        flip_prob: a mirror image along each of the plan's `flips`.
        noise_prob, noise_std: Gaussian noise.
        blur_prob, blur_sigma: a Gaussian filter, sigma along each axis between the two, in voxels.
        scale_prob, scale: all intensities times 1 ± up to scale.
        shift_prob, shift: all intensities plus up to ± shift.
        gamma_prob, gamma: intensities to a power between the two; mean and deviation are kept.
        squared_dice: whether the denominator of the Dice loss has squares.
        dice_smoothing: what its numerator and denominator get added.
        head_weight: weight of a head's loss over that of the next finer one, before normalisation.
        betas, adam_eps: of AdamW.
        warm_up, first_rate: the learning rate rises linearly over this share of the steps, from this share
            of the plan's; then it falls to zero as a cosine.
        clip_norm: the largest norm of the gradient.
    """

    balanced: bool = True
    class_voxels: int = 10_000
    affine_prob: float = 0.3
    rotation: float = 15.0
    scaling: float = 0.15
    padding: str = "border"
    flip_prob: float = 0.5
    noise_prob: float = 0.15
    noise_std: float = 0.1
    blur_prob: float = 0.0
    blur_sigma: tuple[float, float] = (0.5, 1.0)
    scale_prob: float = 0.3
    scale: float = 0.1
    shift_prob: float = 0.3
    shift: float = 0.1
    gamma_prob: float = 0.15
    gamma: tuple[float, float] = (0.7, 1.5)
    squared_dice: bool = True
    dice_smoothing: float = 1e-5
    head_weight: float = 0.5
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    warm_up: float = 0.05
    first_rate: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.endswith("_prob") and not 0 <= value <= 1:
                raise DataError(f"recipe: {name} must lie in [0, 1], got {value!r}")
        if self.padding not in ("border", "zeros"):
            raise DataError(f"recipe: padding must be 'border' or 'zeros', got {self.padding!r}")


RECIPE = Recipe()
