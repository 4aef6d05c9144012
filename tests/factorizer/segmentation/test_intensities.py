"""Which channels are CT, and what is done to voxels that say nothing."""

import numpy as np
import pytest

from factorizer.segmentation.intensities import body, clean, is_ct

LARGEST = {"float32": 3.4028235e38, "float64": 1.7976931348623157e308}


@pytest.mark.parametrize(
    "name",
    [
        "CT",
        "ct",
        "CTA",
        "NCCT",
        "CBCT",
        "CECT",
        "HRCT",
        "LDCT",
        "CT scan",
        "ct_0000",
        "non-contrast CT",
        "CT (HU)",
        "Computed Tomography",
        "low-dose CT",
        "CTPA",
        "CTscan",
        "ctImage",
        "CT 1",
        "ct2",
        "CT_T10",
    ],
)
def test_names_of_ct(name):
    assert is_ct(name)


@pytest.mark.parametrize(
    "name",
    [
        "PET",
        "MRI",
        "T1ce",
        "ctp",
        "CTP CBF",
        "SUV",
        "xCT",
        "ACT",
        "sector",
        "FLAIR",
        "PET (CT-corrected)",
        "positron emission computed tomography",
        "CT mask",
        "CT1",
        "cT1",
        "T1CT",
        "T1 (CT)",
        "T2-CT",
        "ct_flair",
    ],
)
def test_names_of_other_modalities(name):
    assert not is_ct(name)


def tissue(seed=0, shape=(24, 20, 16)):
    rng = np.random.default_rng(seed)
    volume = rng.normal(100, 15, shape).clip(1)
    volume[8:14, 8:12, 5:9] += 60
    volume[:2] = 0
    return volume


FILLS = [-1e6, 1e6, -1e9, "smallest", "largest", -9999.0, -32768.0, 32767.0, 65535.0]


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("where", [np.s_[5, 5, 5], np.s_[2:5], np.s_[:, :, :6]])
def test_fill_values_leave_the_rest_as_it_is(fill, dtype, where):
    volume = tissue().astype(dtype)
    broken = volume.copy()
    broken[where] = {"smallest": -LARGEST[dtype], "largest": LARGEST[dtype]}.get(fill, fill)
    cleaned = clean(broken, ct=False)
    others = np.ones(volume.shape, bool)
    others[where] = False
    np.testing.assert_array_equal(cleaned[others], volume[others].astype(np.float32))
    seen, signal = cleaned[cleaned != 0], volume[volume != 0]
    assert abs(seen.mean() - signal.mean()) < 0.2 * signal.std()
    assert 0.8 < seen.std() / signal.std() < 1.6  # INFLUENCE


def test_fill_values_of_two_kinds():
    volume = tissue()
    broken = volume.copy()
    broken[2:4], broken[4:6] = -1e6, 1e6
    cleaned = clean(broken, ct=False)
    np.testing.assert_array_equal(cleaned[6:], volume[6:].astype(np.float32))
    assert not cleaned[2:6].any()


def test_heavy_tails_are_signal():
    """A small hot lesion, as in PET, stays as it is; so does a volume of few values, such as a mask."""
    rng = np.random.default_rng(0)
    pet = np.abs(rng.normal(0.5, 0.3, (32, 32, 32))).astype(np.float32)
    pet[10:12, 10:12, 10:12] = rng.normal(12, 1, (2, 2, 2))
    np.testing.assert_array_equal(clean(pet, ct=False), pet)
    mask = np.ones((20, 20, 20), np.int16)
    mask[3, 3, 3] = 3000
    np.testing.assert_array_equal(clean(mask, ct=False), mask)


def test_ct_keeps_its_air_and_metal():
    rng = np.random.default_rng(0)
    ct = rng.normal(40, 30, (24, 24, 24)).astype(np.int16)
    ct[:8], ct[20, 20, 20] = -1024, 3071
    np.testing.assert_array_equal(clean(ct, ct=True), ct)
    filled = ct.astype(np.float32)
    filled[:2] = -LARGEST["float32"]
    np.testing.assert_array_equal(clean(filled, ct=True), ct)


def test_scales_that_float32_has_no_squares_for():
    volume = tissue()
    for scale in (1e-30, 1e25):
        cleaned = clean(volume * scale, ct=False)
        assert np.isfinite(np.square(cleaned)).all()
        assert np.corrcoef(cleaned.ravel(), volume.ravel())[0, 1] > 0.9999


def test_nothing_but_fill_values():
    assert clean(np.full((4, 4, 4), -LARGEST["float64"]), ct=False) is None


def head(noise, seed=0):
    """A ball of tissue with a dark cavity, in air; the ball's mask."""
    rng = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(*[np.arange(32) - 15.5] * 3, indexing="ij"), -1)
    distance = np.sqrt((places**2).sum(-1))
    signal = np.where(distance < 12, 100.0, 0) * (distance > 3)
    volume = np.hypot(signal + rng.normal(0, noise, signal.shape), rng.normal(0, noise, signal.shape))
    return volume.astype(np.float32), distance < 12


@pytest.mark.parametrize("scale", [(1, 0), (0.01, 0), (0.02, -0.6)], ids=["plain", "small", "z-scores"])
def test_noise_around_a_head_is_air(scale):
    volume, ball = head(4)
    found = body((volume * scale[0] + scale[1])[..., None], ["T1"])
    assert (found & ball).sum() > 0.97 * ball.sum()
    assert (found & ~ball).sum() < 0.03 * ball.sum()


def test_air_that_was_cut_away_or_is_no_mr():
    volume, ball = head(4)
    cut = np.where(ball, volume + 1, 0)[..., None]
    np.testing.assert_array_equal(body(cut, ["T1"]), ball)
    hounsfield = (np.where(ball, 0, -1000) + np.random.default_rng(1).normal(0, 20, ball.shape)).astype("f4")
    assert (body(hounsfield[..., None], ["CT"]) == ball).mean() > 0.99
    # A map of noise in air beside a volume that shows where air is.
    both = np.stack([volume, np.random.default_rng(2).uniform(1, 1000, ball.shape)], -1).astype(np.float32)
    assert (body(both, ["DWI", "ADC"]) == ball).mean() > 0.98


def test_a_volume_within_the_head_has_no_air():
    volume = np.random.default_rng(0).gamma(20, 5, (16, 16, 16, 1)).astype(np.float32)
    volume[3, 3, 3] = 0
    assert body(volume, ["MRI"]).sum() == 16**3 - 1
