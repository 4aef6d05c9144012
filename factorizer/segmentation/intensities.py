"""What the intensities of a channel mean: CT or not, and which voxels say nothing.

A volume has three kinds of voxels that statistics must not take for signal: zeros (air that was cut
away), fill values (what programs write where they have no data: −FLT_MAX, −1e6, −9999 far from all the
rest) and outliers (single broken voxels, metal). With one of them the mean and standard deviation of a
channel say nothing about the tissue, and a network sees a flat image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

NO_DATA = 1e30  # no scanner's intensity; squares of more than 1.8e19 are beyond float32
REACH = 10.0  # fill values and outliers lie so many times the spread of the others away from them
SPREAD_QUANTILES = (0.005, 0.995)
INFLUENCE = 1.5  # outliers count as such where they make the standard deviation so many times as large
HOUNSFIELD = 32768.0  # no CT is beyond, metal included
FILL = 1e5  # more than 16 bits hold
FACES = 0.01  # share of the voxels on the volume's faces; structures of the body seldom lie there
MAX_GAPS, MIN_DISTINCT = 8, 8
SAMPLE = 2**20  # voxels that quantiles are taken from, at most
AIR_CT = -500.0  # Hounsfield units; half way between air and water
RIM_QUANTILES, NOISE_REACH = (0.05, 0.25), 6.0  # of the voxels at the rim, and how far noise goes beyond them
MAX_AIR = 0.3  # of the bright tissue's intensity (its 95 percentile); noise is darker
CUT_AWAY = 0.05  # share of zeros from which on something was cut away

_CT = re.compile(r"(nc|ce|cb|hr|ld|hd|de|ne|low|dual)*ct(a|v|pa|scan|image|volume)?")
# MR sequences, of which ct1 is T1 with a contrast agent.
_MR = re.compile(r"(?<![a-z])(c?t1|t2)(?!\d)|flair")
_NOT_CT = {"pet", "suv", "spect", "nm", "mr", "mri", "ctp", "cbf", "cbv", "mtt", "tmax", "ttp", "mask", "seg"}


def is_ct(name: str) -> bool:
    """Whether a channel of that name holds Hounsfield units: CT, CTA, NCCT, CBCT, "CT scan", …"""
    words = re.findall(r"[a-z]+|\d+", name.lower())
    text = name.lower()
    if _NOT_CT.intersection(words) or _MR.search(text):
        return False
    return (
        any(_CT.fullmatch(word) for word in words)
        or "tomodensi" in text
        or "hounsfield" in text
        or ("computed tomography" in text and "emission" not in text)
    )


def plausible_range(values: np.ndarray) -> tuple[float, float]:
    """The range that `values`, none of them 0 or beyond ±1e30, have without fill values and outliers.

    They are cut at their largest gaps. The part with the most distinct values is the image: fill values are
    few, if of many voxels. The range reaches REACH times its spread beyond its 0.5 and 99.5 percentiles.
    """
    distinct, counts = np.unique(values, return_counts=True)
    whole = float(distinct[0]), float(distinct[-1])
    cuts = np.sort(np.argsort(np.diff(distinct))[-MAX_GAPS:]) + 1
    parts = np.split(np.arange(len(distinct)), cuts)
    image = max(parts, key=lambda part: (len(part), counts[part].sum()))
    if len(image) < MIN_DISTINCT:
        return whole  # a mask, or a drawing: nothing tells what is far from what
    low, high = np.quantile(np.repeat(distinct[image], counts[image]), SPREAD_QUANTILES).tolist()
    if high <= low:  # most voxels have one value
        low, high = float(distinct[image[0]]), float(distinct[image[-1]])
    return low - REACH * (high - low), high + REACH * (high - low)


def clean(channel: np.ndarray, *, ct: bool) -> np.ndarray | None:
    """A channel (X, Y, Z) as float32 in which every voxel that is not 0 has an intensity of the image.

    Voxels beyond ±1e30 have no data, and become 0, for CT the lowest intensity. Others beyond
    `plausible_range` are brought back to its ends. Where CT is not, those below it have no data, and become
    0, and so do those above it that are a fill value: of one value, which is 1e5 at least, or found at the
    volume's faces. Outside CT all this only where the standard deviation of the image would otherwise be that
    of its outliers: heavy tails, such as a tumour's in PET, stay as they are. None where nothing is left.
    """
    exact = channel.dtype.kind in "biu"
    data = channel != 0
    if not exact:
        # As decimal numbers: 1e30 may be beyond the type itself.
        missing = (channel > NO_DATA) | (channel < -NO_DATA)
        data &= ~missing
    if not data.any():
        return channel.astype(np.float32) if exact or not missing.any() else None
    values = channel[data].astype(np.float64)
    ends = np.array([values.min(), values.max()])  # which a sample may miss
    low, high = plausible_range(np.concatenate([values[:: max(1, len(values) // SAMPLE)], ends]))
    if ct:  # a window cuts off the rest
        low, high = min(low, -HOUNSFIELD), max(high, HOUNSFIELD)
    elif ends[0] < low or ends[1] > high:
        core = values[(values >= low) & (values <= high)]
        if not len(core) or values.std() <= INFLUENCE * core.std():
            low, high = float(ends[0]), float(ends[1])
    scale = _scale(low, high)
    result = np.zeros(channel.shape, np.float32)
    np.clip(values, low, high, out=values)
    values /= scale
    result[data] = values
    if not ct:
        result[(channel < low) & data] = 0
        above = (channel > high) & data
        alike = above.any() and channel[above].min() == ends[1]
        if alike and (ends[1] >= FILL or _share_of_faces(above) > FACES):
            result[above] = 0
    elif not exact:
        result[missing] = max(low, float(ends[0])) / scale
    return result


def window_of(values: np.ndarray, quantiles: Sequence[float]) -> tuple[float, float] | None:
    """The quantiles of labelled intensities that CT is clipped to; None where they are one value."""
    low, high = np.quantile(values.astype(np.float64), quantiles).tolist()
    return (low, high) if high > low else None


def body(image: np.ndarray, modalities: Sequence[str]) -> np.ndarray:
    """The voxels (X, Y, Z) of an image (X, Y, Z, channel) that are no air.

    Air is what was cut away (zeros), what is below −500 HU in CT, and noise: what is as dark as most of the
    rim, if that is much darker than the tissue. A channel that shows no air says nothing; where none does,
    every voxel with a signal counts, as in a volume that lies within the head.
    """
    found = [
        mask
        for name, channel in zip(modalities, np.moveaxis(image, 3, 0), strict=True)
        if (mask := _body_in(channel, ct=is_ct(name))) is not None
    ]
    return np.any(found or [(image != 0).any(axis=3)], axis=0)


def _body_in(channel: np.ndarray, *, ct: bool) -> np.ndarray | None:
    """The voxels (X, Y, Z) of one channel that are no air; None where it shows none."""
    if ct and channel.min() < AIR_CT:
        inside = _without_specks(channel > AIR_CT)
        return inside if inside.any() else None
    signal = channel != 0
    if not signal.any():
        return None
    rim = channel[signal & ~ndimage.binary_erosion(signal)]
    low, middle = np.quantile(rim, RIM_QUANTILES).tolist()
    air = middle + NOISE_REACH * (middle - low)
    if air < MAX_AIR * float(np.quantile(channel[signal], 0.95)):
        inside = _without_specks(channel > air)
        if inside.any():
            return inside
    return signal if signal.mean() < 1 - CUT_AWAY else None


def _without_specks(mask: np.ndarray) -> np.ndarray:
    """The large parts of a mask (X, Y, Z), with the holes that planes along any axis have in them."""
    parts, number = ndimage.label(ndimage.binary_opening(mask))
    if not number:
        return np.zeros_like(mask)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    kept = (sizes >= sizes.max() / 10)[parts]
    for axis in range(3):
        plane = ndimage.generate_binary_structure(3, 1)
        plane[tuple(slice(None, None, 2) if a == axis else slice(None) for a in range(3))] = False
        kept = ndimage.binary_fill_holes(kept, plane)
    return kept


def _share_of_faces(mask: np.ndarray) -> float:
    faces = [mask.take(end, axis) for axis in range(mask.ndim) for end in (0, -1)]
    return float(np.mean([face.mean() for face in faces]))


def _scale(low: float, high: float) -> float:
    """1, or what brings intensities back to where float32 has their squares."""
    largest = max(abs(low), abs(high))
    return 1.0 if 1e-12 < largest < 1e12 or largest == 0 else largest
