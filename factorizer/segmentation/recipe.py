"""The training recipe: every number of it, and of the planning that goes before, in one place.

A `Plan` holds its `Recipe`, so two runs with equal plans train the same network. A new number becomes a
field whose default is what runs did before it existed, such as a probability of 0: a plan that was
written without the field then reads as the recipe that it was trained by. What `plan_run` gives to new
plans is `RECIPE`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from factorizer.segmentation.errors import DataError

# Arguments of `build_network` for new plans, beside channels and size.
WIDTH, STRIDES, PATCH, LOCAL = (24, 48, 96), (1, 2, 2), 4, 3
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
    "local": LOCAL,  # ours, not the paper's
    "num_deep_supr": len(WIDTH) - 1,
}
MAX_CROP_VOXELS = 64**3
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 2, 5e-3, 1e-2
ROUNDS, MIN_STEPS, MAX_STEPS = 10, 300, 1000  # training sees the voxels of its volumes so many times
# Seconds of training, by the names that users give them; and steps, beyond which no task gains (nnU-Net's).
BUDGETS = {"quick": 5 * 60, "standard": 90 * 60, "full": 8 * 3600}
MAX_BUDGET_STEPS = 250_000
HALF_GRID = {"quick"}  # those in which, on a CPU, half the grid's steps make the better network
RANGE_QUANTILES = (0.005, 0.995)  # of the labelled voxels' intensities, which CT is clipped to


@dataclass(frozen=True)
class Recipe:
    """How crops are drawn and changed, what is minimised, and how.

    Probabilities are those of a crop; intensities are those of the preprocessed image.

    Attributes:
        balanced: whether the middle of a crop is a voxel of a class that is drawn first, all classes being
            equally likely; otherwise crops lie anywhere.
        class_voxels: voxels of each class and volume, at most, that middles are drawn from.
        affine_prob: of an affine map by up to `rotation` degrees about each axis and up to the share
            `scaling` along it; outside the crop is `padding`, "border" or "zeros".
        in_plane: where the longest side of the crop is more than so many times the shortest, in voxels, it is
            turned in its squarest plane alone: slices so thick cannot be turned into one another. 0: never.
        zoom_prob: of a magnification, the same along all axes, between the two of `zoom`.
        flip_prob: of a mirror image along each of the plan's `flips`.
        noise_prob: of Gaussian noise, its deviation up to `noise_std`.
        blur_prob: of a Gaussian filter, sigma along each axis between the two of `blur_sigma`, in voxels.
        scale_prob: of all intensities times 1 ± up to `scale`.
        shift_prob: of all intensities plus up to ± `shift`.
        contrast_prob: of distances from the mean times 1 ± up to `contrast`, within the old range.
        low_resolution_prob: of sampling down to a share of the voxels along each axis, between the two of
            `low_resolution`, and up again.
        centred: whether magnified labels, and images that are sampled down, are sampled at the middles of
            voxels. Otherwise both are moved against one another by half a voxel to one along each axis.
        gamma_prob: of intensities to a power between the two of `gamma`; mean and deviation are kept.
        inverted_gamma_prob: of the same for the negative of the image.
        squared_dice: whether the denominator of the Dice loss has squares.
        dice_smoothing: what its numerator and denominator get added.
        head_weight: weight of a head's loss over that of the next finer one, before normalisation.
        betas: of AdamW.
        adam_eps: of AdamW.
        warm_up: the learning rate rises linearly over this share of the steps, from the share `first_rate`
            of the plan's.
        decay: share of the steps, the last ones, over which it falls to zero as a cosine.
        clip_norm: the largest norm of the gradient.
        averaging: the network that is kept is an exponential mean of the weights, w += (1 - averaging) *
            (weights - w) after each step, but w += 9 / (10 + n) * (weights - w) at step n while that is
            more; 0: the last weights.
    """

    balanced: bool = True
    class_voxels: int = 10_000
    affine_prob: float = 0.3
    rotation: float = 15.0
    scaling: float = 0.15
    padding: str = "border"
    in_plane: float = 0.0
    zoom_prob: float = 0.0
    zoom: tuple[float, float] = (0.7, 1.4)
    flip_prob: float = 0.5
    noise_prob: float = 0.15
    noise_std: float = 0.1
    blur_prob: float = 0.0
    blur_sigma: tuple[float, float] = (0.5, 1.0)
    scale_prob: float = 0.3
    scale: float = 0.1
    shift_prob: float = 0.3
    shift: float = 0.1
    contrast_prob: float = 0.0
    contrast: float = 0.25
    low_resolution_prob: float = 0.0
    low_resolution: tuple[float, float] = (0.5, 1.0)
    centred: bool = False
    gamma_prob: float = 0.15
    gamma: tuple[float, float] = (0.7, 1.5)
    inverted_gamma_prob: float = 0.0
    squared_dice: bool = True
    dice_smoothing: float = 1e-5
    head_weight: float = 0.5
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    warm_up: float = 0.05
    first_rate: float = 0.1
    decay: float = 1.0
    clip_norm: float = 1.0
    averaging: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.endswith("_prob") and not 0 <= value <= 1:
                raise DataError(f"recipe: {name} must lie in [0, 1], got {value!r}")
        for name in ("warm_up", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"recipe: {name} must lie in [0, 1], got {getattr(self, name)!r}")
        if not 0 <= self.averaging < 1:
            raise DataError(f"recipe: averaging must lie in [0, 1), got {self.averaging!r}")
        if self.padding not in ("border", "zeros"):
            raise DataError(f"recipe: padding must be 'border' or 'zeros', got {self.padding!r}")


# Spatial and intensity changes with nnU-Net's probabilities and ranges (Isensee et al., 2021), but for its
# mirror images along all axes: the plan's `flips` are those that anatomy has.
RECIPE = Recipe(
    affine_prob=0.2,
    rotation=30.0,
    scaling=0.0,
    padding="zeros",
    in_plane=3.0,
    zoom_prob=0.2,
    noise_prob=0.1,
    noise_std=0.3,
    blur_prob=0.2,
    scale_prob=0.15,
    scale=0.25,
    shift_prob=0.0,
    contrast_prob=0.15,
    low_resolution_prob=0.25,
    centred=True,
    gamma_prob=0.3,
    inverted_gamma_prob=0.1,
    decay=0.4,
    averaging=0.998,
)
