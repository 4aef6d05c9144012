"""Volumes in files of any format, in and out: every command reads by `load` and writes by `save`.

A volume is a nibabel image, whose voxels are read when they are asked for. NIfTI is nibabel's own; NRRD and
MetaImage go through SimpleITK, DICOM series through pydicom: the extra `io`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from factorizer.segmentation.affines import affine_of
from factorizer.segmentation.dicom import LPS_TO_RAS, dicom_files, read_series, read_voxels
from factorizer.segmentation.errors import DataError, needed
from factorizer.segmentation.names import ITK_ENDINGS, PAIRED

# What a header has where it says which side is left; without it ITK takes the axes to run to the left, to the
# back and upwards.
SIDES = {
    ".nrrd": (rb"^space:\s*(left|right|las|ras|lps)", rb"^space directions:"),
    ".mha": (rb"^(TransformMatrix|Rotation|Orientation)\s*=",),
}
MAX_HEADER = 2**16  # bytes that are searched for it


class LateVoxels:
    """Voxels that are read when they are asked for: what nibabel calls an array proxy."""

    is_proxy = True

    def __init__(self, shape: tuple[int, ...], dtype: Any, read: Callable[[], np.ndarray]) -> None:
        self.shape, self.dtype, self.ndim, self._read = shape, np.dtype(dtype), len(shape), read

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._read(), dtype)

    def __getitem__(self, place: Any) -> np.ndarray:
        return np.asarray(self)[place]


def load(path: Path) -> nib.Nifti1Image:
    """The volume of a file, or of the folder of a DICOM series; its voxels are not read yet.

    Raises DataError where there is none, or it cannot be read.
    """
    if path.is_dir():
        series = read_series(path)
        return _image(LateVoxels(series.shape, np.float32, lambda: read_voxels(series)), series.affine)
    if path.name.lower().endswith(tuple(ITK_ENDINGS)):
        return _load_itk(path)
    return _load_nifti(path)


def save(volume: nib.Nifti1Image, path: Path) -> None:
    """Writes a volume in the format that the ending of `path` names: NIfTI, NRRD or MetaImage."""
    io = ITK_ENDINGS.get(path.suffix.lower())
    if io is None:
        nib.save(volume, path)
        return
    sitk = needed("SimpleITK", "io", path)
    affine = LPS_TO_RAS @ affine_of(volume)  # in mm, which the header of a NIfTI need not be in
    sizes = nib.affines.voxel_sizes(affine)
    image = sitk.GetImageFromArray(np.asarray(volume.dataobj).T)
    image.SetSpacing(sizes.tolist())
    image.SetDirection((affine[:3, :3] / sizes).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    sitk.WriteImage(image, str(path), useCompression=True, imageIO=io)


def parts_of(path: Path) -> list[Path]:
    """The files that a volume is in: of a pair also the header's, of a series those of all slices."""
    if path.is_dir():
        return dicom_files(path)
    if not path.name.lower().endswith(PAIRED):
        return [path]
    files: Any = load(path).file_map
    return [Path(holder.filename) for holder in files.values() if Path(holder.filename).exists()]


def _load_nifti(path: Path) -> nib.Nifti1Image:
    try:
        if not path.exists():
            raise FileNotFoundError
        if path.name != path.name.lower() and path.name.lower().endswith((".nii", ".nii.gz")):
            # nibabel takes endings in small letters or in capitals, but for no mixture, such as .Nii
            file: Any = nib.Nifti1Image.from_file_map({"image": nib.fileholders.FileHolder(str(path))})
        else:
            file = nib.load(path)
    except FileNotFoundError as error:
        missing = "" if not path.exists() else f": its header {path.stem}.hdr is missing"
        raise DataError(f"{path}: there is no such file{missing}") from error
    except Exception as error:  # a broken file makes nibabel, zlib or numpy raise one of a dozen
        raise DataError(f"{path}: not readable as NIfTI ({str(error) or type(error).__name__})") from error
    if not isinstance(file.header, nib.Nifti1Header):
        analyze = isinstance(file.header, nib.AnalyzeHeader)
        sides = "it does not say which side is left. Convert it" if analyze else "convert it"
        raise DataError(
            f"{path}: is {type(file).__name__}, no NIfTI: {sides} to NIfTI with a program that knows where "
            "it came from"
        )
    return file


def _load_itk(path: Path) -> nib.Nifti1Image:
    """An image with three axes of space; several numbers for each voxel are a fourth axis."""
    sitk = needed("SimpleITK", "io", path)
    if not path.exists():
        raise DataError(f"{path}: there is no such file")
    io = ITK_ENDINGS[path.suffix.lower()]
    try:
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        reader.SetImageIO(io)
        reader.ReadImageInformation()
        shape, numbers = tuple(reader.GetSize()), reader.GetNumberOfComponents()
        voxel = sitk.Image([1] * len(shape), reader.GetPixelIDValue(), numbers)
        dtype = sitk.GetArrayViewFromImage(voxel).dtype
    except Exception as error:
        raise _unreadable(path, error) from error
    if len(shape) != 3:
        raise DataError(f"{path}: has {len(shape)} axes; it must have three, of space")
    sizes = np.array(reader.GetSpacing())
    affine = np.eye(4)
    affine[:3, :3] = np.array(reader.GetDirection()).reshape(3, 3) * sizes
    affine[:3, 3] = reader.GetOrigin()

    def read() -> np.ndarray:
        try:
            voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(path), imageIO=io))
        except Exception as error:
            raise _unreadable(path, error) from error
        return np.moveaxis(voxels, -1, 0).T if numbers > 1 else voxels.T

    whole = shape if numbers == 1 else (*shape, numbers)
    return _image(LateVoxels(whole, dtype, read), LPS_TO_RAS @ affine, known=_says_sides(path))


def _says_sides(path: Path) -> bool:
    """Whether the header of an NRRD or MetaImage file says which side is left."""
    with path.open("rb") as file:
        text = re.split(rb"\n\r?\n|\nElementDataFile", file.read(MAX_HEADER), maxsplit=1)[0]
    fields = SIDES[path.suffix.lower()]
    return all(re.search(field, text, re.IGNORECASE | re.MULTILINE) for field in fields)


def _image(voxels: LateVoxels, affine: np.ndarray, *, known: bool = True) -> nib.Nifti1Image:
    """With a header that says what the affine is to: the scanner's axes, mm; or that this is not known."""
    image = nib.Nifti1Image(voxels, affine, dtype=voxels.dtype)
    # Not updated: by codes of 0 nibabel would make up an affine of its own.
    image.set_sform(affine, int(known), update_affine=False)
    image.set_qform(affine, int(known), update_affine=False)
    image.header.set_xyzt_units("mm")
    return image


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not readable as {path.suffix[1:].upper()} ({' '.join(str(error).split())})")
