"""DICOM: a series of slices in a folder as a volume, and a label map as a segmentation object (DICOM-SEG).

DICOM's axes run left, posterior, superior; everything else here has right, anterior, superior.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from factorizer.segmentation.errors import DataError, needed
from factorizer.segmentation.names import is_volume
from factorizer_kernels import __version__

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
SAME_PLACE = 1e-3  # mm between two slices that show the same
UNEVEN = 0.1  # mm, or of the spacing: how far a slice may lie from an even grid, as positions are rounded
MAX_TILT = 0.2  # degrees between the stack of slices and the perpendicular of a slice
SAME_AXES = 1e-3  # between direction cosines
HEADER = (
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesDescription", "Rows", "Columns"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "NumberOfFrames", "SamplesPerPixel"),
    *("PhotometricInterpretation", "RescaleSlope", "RescaleIntercept"),
)

# What a DICOM-SEG repeats of its series, and the standard lets be empty (type 2): anonymised series lack it.
MAY_BE_EMPTY = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"),
    *("AccessionNumber", "ReferringPhysicianName"),
)

# How many numbers say where a slice lies, and on which scale its values are.
NUMBERS = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
NUMBERS |= {"RescaleSlope": 1, "RescaleIntercept": 1}


@dataclass(frozen=True)
class Series:
    """The images of one series, in the order of the slices.

    Attributes:
        files: one for each slice.
        affine: (4, 4), from column, row, slice to mm, axes right, anterior, superior.
        shape: columns, rows, slices.
    """

    files: tuple[Path, ...]
    affine: np.ndarray
    shape: tuple[int, int, int]


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files in a folder, by what they begin with: many have no ending. Empty where it is none."""
    return [path for path in sorted(folder.iterdir()) if _is_dicom(path)] if folder.is_dir() else []


def check_folder(path: Path) -> None:
    """Raises DataError where a folder is called as a volume's file, and holds no DICOM."""
    if path.is_dir() and is_volume(path) and not dicom_files(path):
        inside = [file.name for file in sorted(path.iterdir())]
        held = (
            f"; it holds {', '.join(inside[:3])}{' and others' if len(inside) > 3 else ''}" if inside else ""
        )
        raise DataError(
            f"{path}: is a folder that is called like a file, as some programs unpack archives{held}. Give "
            "the file in it, or put that in the folder's place"
        )


def read_series(folder: Path) -> Series:
    """Which slices are in a folder, and where. Reads no voxels.

    Raises DataError where there is no series or more than one, or where its slices make no volume: other
    directions or sizes, slices twice, missing, at uneven distances or sheared (gantry tilt).
    """
    check_folder(folder)
    pydicom = needed("pydicom", "io", folder)
    series: dict[str, list[tuple[Path, Any]]] = {}
    unplaced: list[tuple[Path, Any]] = []
    for path in dicom_files(folder):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(HEADER))
            image = "ImagePositionPatient" in header and "ImageOrientationPatient" in header
            image = image or int(header.get("NumberOfFrames") or 1) > 1
        except Exception as error:  # a broken file makes pydicom raise one of a dozen
            raise _unreadable(path, error) from error
        kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
        if "Rows" not in header:  # a report, contours, DICOMDIR
            if not kind or " Image Storage" in getattr(kind, "name", ""):
                raise _unreadable(path, ValueError("it has no tag Rows: is it cut off?"))
        elif image:
            series.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((path, header))
        else:
            unplaced.append((path, header))
    if len(series) != 1:
        found = ", ".join(
            f"{str(members[0][1].get('SeriesDescription', '')) or uid!r} ({len(members)} images)"
            for uid, members in series.items()
        )
        raise DataError(
            f"{folder}: holds {f'{len(series)} DICOM series: {found}' if series else 'no DICOM images'}; a "
            "volume is one series in a folder of its own"
        )
    ((uid, members),) = series.items()
    _check_whole(folder, uid, members, unplaced)
    try:
        return _in_order(folder, members)
    except DataError:
        raise
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise DataError(f"{folder}: its DICOM headers lack what a volume needs ({error})") from error


def read_voxels(series: Series) -> np.ndarray:
    """The voxels (columns, rows, slices) of a series, float32, on the scale that its headers give them."""
    folder = series.files[0].parent
    pydicom, pixels = needed("pydicom", "io", folder), needed("pydicom.pixels", "io", folder)
    voxels = np.empty(series.shape, np.float32)
    for k, path in enumerate(series.files):
        try:
            image = pydicom.dcmread(path)
            voxels[:, :, k] = pixels.apply_modality_lut(image.pixel_array, image).T
        except Exception as error:
            raise _unreadable(path, error) from error
    return voxels


def write_segmentation(
    labels: nib.Nifti1Image, folder: Path, targets: Mapping[str, Sequence[int]], path: Path
) -> None:
    """Writes a label map on the grid of the series in `folder` as a DICOM-SEG with a binary segment for each
    of `targets`, names and the label values that make them up, numbered from 1 in their order.

    Targets may share values, as nested regions do: their segments overlap.

    Raises DataError where the series lacks what such a file needs.
    """
    series = read_series(folder)
    highdicom, pydicom = needed("highdicom", "io", path), needed("pydicom", "io", path)
    codes = needed("pydicom.sr.codedict", "io", path).codes
    segments = _segments(np.asarray(labels.dataobj).T, list(targets.values()))
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="factorizer", version=__version__, family=codes.DCM.ArtificialIntelligence
    )
    descriptions = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            # A network's classes have names, and no codes of a terminology.
            segmented_property_type=highdicom.sr.CodedConcept(
                "+".join(map(str, values)), "99FACTORIZER", name[:64]
            ),
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
        )
        for number, (name, values) in enumerate(targets.items(), 1)
    ]
    try:
        images = [pydicom.dcmread(file, stop_before_pixels=True) for file in series.files]
        thickness = f"{np.linalg.norm(series.affine[:3, 2]):.6g}"
        for image in images:
            # Of the source's characters highdicom takes few, and classes may have any.
            image.decode()
            image.SpecificCharacterSet = "ISO_IR 192"
            for tag in MAY_BE_EMPTY:
                if tag not in image:
                    setattr(image, tag, "")
            if not image.get("SliceThickness"):
                image.SliceThickness = thickness
        segmentation = highdicom.seg.Segmentation(
            source_images=images,
            pixel_array=segments,
            omit_empty_frames=bool(segments.any()),
            segmentation_type="BINARY",
            segment_descriptions=descriptions,
            series_instance_uid=highdicom.UID(),
            series_number=1000 + int(images[0].get("SeriesNumber") or 0),
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="factorizer-kernels",
            manufacturer_model_name="factorizer",
            software_versions=__version__,
            device_serial_number="none",
            series_description="Segmentation by factorizer",
        )
    except Exception as error:  # of the source's headers: highdicom asks for what the standard asks for
        raise DataError(
            f"{folder}: no DICOM-SEG can be made for it ({str(error) or type(error).__name__})"
        ) from error
    segmentation.save_as(path)


def _segments(labels: np.ndarray, targets: Sequence[Sequence[int]]) -> np.ndarray:
    """Of a label map (slices, rows, columns) the numbers of the targets; where they share values their masks,
    on a fourth axis."""
    values = [value for united in targets for value in united]
    if len(set(values)) < len(values):
        return np.stack([np.isin(labels, list(united)) for united in targets], axis=-1).astype(np.uint8)
    # Masks of a hundred classes would fill the memory.
    numbers = np.zeros(256, np.uint8)
    for number, united in enumerate(targets, 1):
        numbers[list(united)] = number
    return np.ascontiguousarray(numbers[labels])


def _in_order(folder: Path, members: Sequence[tuple[Path, Any]]) -> Series:
    first = members[0][1]
    if any(int(header.get("NumberOfFrames") or 1) > 1 for _, header in members):
        raise DataError(
            f"{folder}: {members[0][0].name} holds several frames (enhanced DICOM), and one slice for each "
            "file is read. Convert it to NIfTI, by dcm2niix for example"
        )
    if any(
        int(header.get("SamplesPerPixel") or 1) > 1
        or str(header.get("PhotometricInterpretation", "")).startswith("PALETTE")
        for _, header in members
    ):
        raise DataError(f"{folder}: its images are in colour; they must hold one number for each voxel")
    for path, header in members:
        for tag, number in NUMBERS.items():
            _check_numbers(path, header, tag, number)
    axes = np.array([header.ImageOrientationPatient for _, header in members], float)
    if np.abs(axes - axes[0]).max() > SAME_AXES:
        raise DataError(
            f"{folder}: its slices lie in different directions (a localizer?); they must be parallel"
        )
    for what, read in (
        ("sizes", lambda header: (int(header.Columns), int(header.Rows))),
        ("pixel spacings", lambda header: tuple(map(float, header.PixelSpacing))),
    ):
        found = sorted({read(header) for _, header in members})
        if len(found) > 1:
            raise DataError(f"{folder}: its slices have different {what}: {found[0]} and {found[1]}")
    if len(members) < 2:
        raise DataError(f"{folder}: holds one slice; a volume has several")
    along_row, along_column = axes[0].reshape(2, 3)
    normal = np.cross(along_row, along_column)
    places = np.array([header.ImagePositionPatient for _, header in members], float)
    heights = places @ normal
    order = np.argsort(heights, kind="stable")
    places, heights = places[order], heights[order]
    _check_distances(folder, heights)
    step = (places[-1] - places[0]) / (len(places) - 1)
    upright = abs(float(step @ normal) / float(np.linalg.norm(step)))
    tilt = float(np.degrees(np.arccos(min(upright, 1.0))))
    if tilt > MAX_TILT:
        raise DataError(
            f"{folder}: its slices are stacked at {tilt:.1f} degrees to their perpendicular (gantry tilt); "
            "make them upright first, as dcm2niix does"
        )
    rows, columns = map(float, first.PixelSpacing)
    affine = np.eye(4)
    affine[:3] = np.stack([along_row * columns, along_column * rows, step, places[0]], axis=1)
    files = tuple(members[k][0] for k in order)
    return Series(files, LPS_TO_RAS @ affine, (int(first.Columns), int(first.Rows), len(files)))


def _check_whole(
    folder: Path, uid: str, members: Sequence[tuple[Path, Any]], unplaced: Sequence[tuple[Path, Any]]
) -> None:
    """Raises DataError where a slice of the series seems to be among what is left out: without it the volume
    would be shorter, and nobody would know."""
    classes = [*(header.get("SOPClassUID") for _, header in members), None, ""]
    for path, header in unplaced:
        # Pictures of a screen have a series or a class of their own.
        if str(header.get("SeriesInstanceUID", "")) == uid and header.get("SOPClassUID") in classes:
            absent = [tag for tag in ("ImagePositionPatient", "ImageOrientationPatient") if tag not in header]
            raise DataError(
                f"{path}: is an image of the series without the DICOM tag {' and '.join(absent)}; each slice "
                "needs it. Where it is no slice, take it out of the folder"
            )
    named = {_pattern(path) for path, _ in members}
    for path in sorted(folder.iterdir()):
        if _pattern(path) in named and not path.is_dir() and not _is_dicom(path):
            if not os.access(path, os.R_OK):  # a link to nowhere too
                held = "cannot be opened"
            else:
                held = "has no DICM after its first 128 bytes" if path.stat().st_size else "is empty"
            raise DataError(
                f"{path}: is called like the slices beside it and is not readable as DICOM: it {held}. Give "
                "the whole slice in its place, or take it out of the folder where it is none"
            )


def _pattern(path: Path) -> str:
    """What the names of a series have in common: all but numbers, hexadecimal ones too, and UIDs."""
    number = "[0-9a-f]*[0-9][0-9a-f]*"
    return re.sub(rf"{number}([.-]{number})*", "#", path.name.lower())


def _check_numbers(path: Path, header: Any, tag: str, number: int) -> None:
    """Raises DataError where the slice has the tag, with other than so many numbers."""
    if tag not in header:
        return
    try:
        # What is no number pydicom refuses only here, where it is asked for.
        value = header[tag].value
        broken = len(list(map(float, [value] if number == 1 else value or ()))) != number
    except (TypeError, ValueError):
        broken = True
    if broken:
        told = header.get_item(tag).value  # as the file has it
        raise DataError(
            f"{path}: its DICOM tag {tag} is {told!r}; it must be {number} number{'s' * (number > 1)}"
        )


def _check_distances(folder: Path, heights: np.ndarray) -> None:
    """Whether slices at these places, in mm along their perpendicular, in order, are those of one volume."""
    distances = np.diff(heights)
    if (distances < SAME_PLACE).any():
        at = heights[int(distances.argmin())]
        raise DataError(
            f"{folder}: holds several slices of one place (at {at:.2f} mm): times, echoes or copies in one "
            "series; give one volume of them in a folder of its own"
        )
    spacing = float(np.median(distances))
    gap = int(distances.argmax())
    if distances[gap] > 1.5 * spacing:
        missing = max(1, round(float(distances[gap]) / spacing) - 1)
        raise DataError(
            f"{folder}: {missing} {'slice is' if missing == 1 else 'slices are'} missing between "
            f"{heights[gap]:.2f} and {heights[gap + 1]:.2f} mm, where slices are {spacing:.4g} mm apart"
        )
    even = np.linspace(heights[0], heights[-1], len(heights))
    if np.abs(heights - even).max() > UNEVEN * max(spacing, 1.0):
        raise DataError(
            f"{folder}: its slices are unevenly spaced, {distances.min():.4g} to {distances.max():.4g} mm "
            "apart; bring them to an even grid first"
        )


def _is_dicom(path: Path) -> bool:
    if not path.is_file() or path.name.upper() == "DICOMDIR":
        return False
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not readable as DICOM ({str(error) or type(error).__name__})")
