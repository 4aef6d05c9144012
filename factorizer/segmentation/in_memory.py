"""Segmentation of arrays and nibabel images, the way that `factorizer predict` goes with files."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from factorizer.segmentation.affines import affine_of
from factorizer.segmentation.cases import with_grid
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.inference import Predictor, load_predictor
from factorizer.segmentation.processes import pick_device
from factorizer.segmentation.survey import doubts_of_files
from factorizer.segmentation.trained import find_model, known_models
from factorizer.segmentation.volumes import LoadedCase, Volume, on_grid_of
from factorizer_kernels.shared.checks import integer

KINDS = "a NumPy array (X, Y, Z) or (X, Y, Z, modality), or a nibabel image"


def segment(
    image: Any,
    model: str | Path | Sequence[str | Path] | Predictor,
    *,
    affine: Any = None,
    spacing: Sequence[float] | None = None,
    probabilities: bool = False,
    resample: str = "",
    num_iters: int | None = None,
    whole: bool = False,
    mirror: bool | None = None,
    device: str | None = None,
) -> Any:
    """Segments a volume that is in memory.

    It goes the way of `factorizer predict`: same checks, same preprocessing, same label values, on the grid
    that the volume came in. What is allowed and seldom meant is told by `warnings.warn`.

    Args:
        image: NumPy array or nibabel image, (X, Y, Z) or (X, Y, Z, modality); for several modalities also
            a mapping of their names to volumes (X, Y, Z), or a sequence of them in the network's order.
        model: a name of `factorizer models`; the path of a checkpoint or a model file, or several paths,
            whose networks are averaged; or what `load_predictor` returned, which is not loaded again for
            each volume.
        affine: (4, 4), from indices of an array to mm, axes right, anterior, superior. A nibabel image has
            its own.
        spacing: in place of an affine, voxel size in mm of an array whose axes run to the right, to the front
            and upwards.
        probabilities: return those too.
        resample: bring modalities that lie on other grids to that of the modality of this name, or of the
            "first".
        num_iters, whole, mirror, device: see `load_predictor`. A loaded `model` has them already.

    Returns:
        Label values, uint8, of the image's kind. That is an array (X, Y, Z), or a nibabel NIfTI image on the
        grid of the image, or of the modality that the others are brought to.
        With `probabilities` a pair: the label values, and a dict with the probabilities of each output, by
        its name, float32, of the same kind and shape. They are those of the regions, each for itself, or of
        the labels, background first, together 1.

    Raises:
        DataError: an argument cannot be used; the message names it, what it got and what it needs.
    """
    _check_truths(probabilities=probabilities, whole=whole, mirror=True if mirror is None else mirror)
    if not isinstance(resample, str):
        raise DataError(f"resample: got {resample!r}; it must be a modality's name, 'first' or ''")
    if num_iters is not None:
        try:
            integer("num_iters", num_iters)
        except (TypeError, ValueError) as error:
            raise DataError(f"num_iters: got {num_iters!r}; it must be a whole number from 0 on") from error
    predictor = _predictor(model, num_iters=num_iters, whole=whole, mirror=mirror, device=device)
    names = predictor.plan.modalities
    given = _by_modality(image, names)
    case = LoadedCase(
        "image",
        tuple(Path(name) for name in given),
        volumes=tuple(_volume(name, one, affine, spacing) for name, one in given.items()),
    )
    (case,) = with_grid([case], names, resample)
    doubts = doubts_of_files([case])
    predictor.tell = doubts.append
    labels, chances = predictor.results(case, probabilities=probabilities)
    for doubt in doubts:
        warnings.warn(doubt, stacklevel=2)
    like = list(given.values())[case.grid if len(given) > 1 else 0]
    if chances is None:
        return _like(labels, like)
    by_name = zip(predictor.plan.outputs, chances.numpy(), strict=True)
    return _like(labels, like), {name: _like(values, like) for name, values in by_name}


def _check_truths(**options: Any) -> None:
    """Raises DataError for what is neither True nor False: "no" would count as True."""
    for name, value in options.items():
        if not isinstance(value, (bool, np.bool_)):
            raise DataError(f"{name}: got {value!r}; it must be True or False")


def _predictor(model: Any, **options: Any) -> Predictor:
    """The networks that `model` names, or is. Raises DataError for options of networks that are loaded."""
    if isinstance(model, Predictor):
        for name, value in options.items():
            if value is not None and (name, value) != ("whole", False):
                raise DataError(
                    f"{name}: got {value!r}; the loaded model has its own, give it to load_predictor"
                )
        return model
    if isinstance(model, (str, Path)):
        model = [model]
    if not isinstance(model, Sequence) or not all(isinstance(one, (str, Path)) for one in model) or not model:
        raise DataError(
            f"model: got {type(model).__name__}; it must be a name of `factorizer models`, the path of a "
            "checkpoint, several paths, or what load_predictor returned"
        )
    files = [_file_of(one) for one in model]
    options["device"] = str(pick_device(options["device"]))  # what is wrong after this is the files
    try:
        return load_predictor(files, **options)
    except DataError as error:
        raise DataError(f"model: {error}") from error


def _file_of(model: str | Path) -> Path:
    """The file that a name or a path stands for. What has a folder is a path, or an ending and no model's
    name. Raises DataError where there is none."""
    path = Path(model)
    if isinstance(model, Path) or len(path.parts) > 1 or (path.suffix and model not in known_models()):
        if not path.exists():
            raise DataError(f"model: there is no {path}")
        return path
    return find_model(model)


def _by_modality(image: Any, modalities: Sequence[str]) -> dict[str, Any]:
    """The volumes by what errors call them, in the order of the modalities."""
    if isinstance(image, Mapping):
        known = {str(key).lower(): key for key in image}
        if len(known) < len(image) or known.keys() != {name.lower() for name in modalities}:
            raise DataError(
                f"image: has the modalities {', '.join(map(repr, image)) or 'none'}; they must be "
                f"{', '.join(map(repr, modalities))}"
            )
        return {f"image[{known[name.lower()]!r}]": image[known[name.lower()]] for name in modalities}
    if isinstance(image, (list, tuple)):
        if len(image) != len(modalities):
            raise DataError(
                f"image: is a sequence of {len(image)}; there must be one for each of the {len(modalities)} "
                f"modalities ({', '.join(modalities)})"
            )
        return {f"image[{k}]": one for k, one in enumerate(image)}
    return {"image": image}


def _volume(name: str, image: Any, affine: Any, spacing: Any) -> Volume:
    """Raises DataError where it is none."""
    header: nib.Nifti1Header | None = None
    if isinstance(image, nib.spatialimages.SpatialImage):
        for argument, value in (("affine", affine), ("spacing", spacing)):
            if value is not None:
                raise DataError(f"{argument}: is given, and {name} is a nibabel image, which has its own")
        if image.affine is None:
            raise DataError(f"{name}: is a nibabel image without an affine; give it one")
        own = image.affine
        if isinstance(image, nib.Nifti1Pair):
            own, header = affine_of(image), image.header
        elif isinstance(image, nib.AnalyzeImage):
            raise DataError(
                f"{name}: is {type(image).__name__}, which does not say which side is left; give its voxels "
                "as an array, with their affine"
            )
        voxels = np.asarray(image.dataobj)
    elif isinstance(image, np.ndarray):
        own, voxels = _affine(affine, spacing), image
    else:
        raise DataError(f"{name}: got {type(image).__name__}; it must be {KINDS}")
    if voxels.dtype.kind not in "biuf":
        raise DataError(f"{name}: its voxels are {voxels.dtype}; they must be real numbers")
    return Volume(Path(name), own, voxels, header)


def _affine(affine: Any, spacing: Any) -> np.ndarray:
    """The affine of an array. Raises DataError unless one of the two is given, and is right."""
    if (affine is None) == (spacing is None):
        raise DataError(
            "affine, spacing: give one of them for an array: the affine (4, 4) to mm, or the voxel size in mm"
        )
    name, given, shape = ("affine", affine, (4, 4)) if spacing is None else ("spacing", spacing, (3,))
    try:
        numbers = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        numbers = np.zeros(0)
    if numbers.shape != shape or not np.isfinite(numbers).all():
        told = given.tolist() if isinstance(given, np.ndarray) else given
        raise DataError(f"{name}: got {told!r}; it must be finite numbers of shape {shape}")
    if spacing is not None:
        if (numbers <= 0).any():
            raise DataError(f"spacing: got {given!r}; lengths must be above 0 mm")
        return np.diag([*numbers, 1.0])
    if not np.array_equal(numbers[3], (0, 0, 0, 1)):
        raise DataError(f"affine: its last row is {numbers[3].tolist()}; it must be 0, 0, 0, 1")
    return numbers


def _like(values: np.ndarray, image: Any) -> Any:
    """Values (X, Y, Z) as an array, or where the image is nibabel's on its grid."""
    if isinstance(image, np.ndarray):
        return values
    if isinstance(image, nib.Nifti1Pair):
        return on_grid_of(values, image)
    return nib.Nifti1Image(values, image.affine)
