"""What is read from and written to NIfTI files, and what is wrong with them."""

import gzip
import shutil

import nibabel as nib
import numpy as np
import pytest
from factorizer_support import save_volume
from scipy.spatial.transform import Rotation

from factorizer.segmentation.cases import Case, Task, read_decathlon, with_grid
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.survey import check_case, doubts_of_files
from factorizer.segmentation.volumes import (
    check_image,
    check_label,
    on_grid_of,
    read_labels,
    write_volume,
)


@pytest.fixture
def folder(synthetic, tmp_path):
    return shutil.copytree(synthetic, tmp_path / "task")


def check_all(folder):
    task = read_decathlon(folder)
    return [check_case(task, case) for case in task.cases]


def labelled(folder, image, label, affine=None, unit=None):
    """A case with these voxels, in files with this unit of length."""
    paths = folder / "image.nii.gz", folder / "label.nii.gz"
    for path, volume in zip(paths, (image, label), strict=True):
        file = (
            volume
            if isinstance(volume, nib.Nifti1Image)
            else nib.Nifti1Image(volume, np.eye(4) if affine is None else affine)
        )
        if unit:
            file.header.set_xyzt_units(unit)
        nib.save(file, path)
    return Case("case", paths[:1], paths[1])


def rewrite(path, change):
    image = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asarray(image.dataobj)), image.affine), path)


@pytest.mark.parametrize("kind", ["imagesTr", "labelsTr"])
@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_unreadable_nifti(folder, kind, content):
    path = folder / kind / "synthetic_002.nii.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "truncated" else content)
    with pytest.raises(DataError, match=rf"{kind}/synthetic_002.nii.gz: not readable as NIfTI"):
        check_all(folder)


@pytest.mark.parametrize("kind", ["imagesTr", "labelsTr"])
def test_a_damaged_file_that_can_still_be_unpacked(folder, kind):
    """One bit of the voxels, stored as they are: only the checksum behind them knows."""
    path = folder / kind / "synthetic_002.nii.gz"
    packed = bytearray(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=0))
    packed[len(packed) // 2] ^= 1
    path.write_bytes(packed)
    with pytest.raises(DataError, match=rf"{kind}/synthetic_002.nii.gz: not readable as NIfTI \(CRC check"):
        check_all(folder)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("labelsTr", lambda x: x[:-1], r"labelsTr/.*shape .* does not match"),
        ("imagesTr", lambda x: x[..., :1], "1 channel; there must be one for each of the 2 modalities"),
        ("imagesTr", lambda x: x[..., 0], "1 channel; there must be one for each of the 2 modalities"),
        ("imagesTr", lambda x: np.stack([x, x], -1), "has shape"),
        ("imagesTr", lambda x: np.where(x == x.max(), np.nan, x), "NaN or infinite"),
        ("imagesTr", lambda x: x * 0, "nothing but zeros"),
        ("labelsTr", lambda x: np.where(x == 2, 3, x).astype(np.uint8), "label value 3 has no"),
        ("labelsTr", lambda x: np.where(x == 2, 1.5, x), r"label value 1\.5 has no class"),
    ],
)
def test_volume_errors(folder, kind, change, words):
    rewrite(folder / kind / "synthetic_003.nii.gz", change)
    with pytest.raises(DataError, match=words) as error:
        check_all(folder)
    assert "synthetic_003" in str(error.value)


def test_label_on_another_grid(folder):
    path = folder / "labelsTr" / "synthetic_001.nii.gz"
    label = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj), np.diag([2.0, 2, 2, 1])), path)
    with pytest.raises(DataError, match=r"its affine differs from that of .*imagesTr/.*The two must"):
        check_all(folder)


def test_geometry_is_told_in_canonical_axes(tmp_path):
    # Array axes run superior, left, posterior, 2, 3 and 4 mm apart.
    affine = np.array([[0, -3, 0, 5], [0, 0, -4, 6], [2, 0, 0, 7], [0, 0, 0, 1]], dtype=float)
    label = np.zeros((4, 5, 6), dtype=np.uint8)
    case = labelled(tmp_path, label.astype(np.float32) + 1, label, affine)
    geometry = check_case(Task("t", ("MRI",), {0: "background", 1: "a"}, (case,)), case)
    assert geometry.shape == (5, 6, 4)
    assert geometry.spacing == pytest.approx((3, 4, 2))


def test_modalities_in_several_files(tmp_path):
    affine = np.diag([1.0, 2, 3, 1])
    a, b = (
        save_volume(tmp_path / "a.nii", affine=affine),
        save_volume(tmp_path / "b.nii", affine=affine, fill=2),
    )
    found, image = check_image(Case("case", (a, b)), ("A", "B"))
    assert np.array_equal(found, affine)
    assert image.shape == (4, 5, 6, 2)
    assert image[..., 1].min() == 2
    other = save_volume(tmp_path / "other.nii", affine=np.diag([1.0, 2, 3.1, 1]))
    with pytest.raises(DataError, match=r"other.nii: lies on another grid than .*a.nii"):
        check_image(Case("case", (a, other)), ("A", "B"))
    larger = save_volume(tmp_path / "larger.nii", shape=(4, 5, 7), affine=affine)
    with pytest.raises(DataError, match=r"larger.nii: shape \(4, 5, 7\) does not match \(4, 5, 6\)"):
        check_image(Case("case", (a, larger)), ("A", "B"))
    with pytest.raises(DataError, match="2 channels; there must be one for each of the 3 modalities"):
        check_image(Case("case", (a, b)), ("A", "B", "C"))
    with pytest.raises(DataError, match=r"absent.nii: there is no such file"):
        check_image(Case("case", (a, tmp_path / "absent.nii")), ("A", "B"))


def test_volumes_that_are_no_images(tmp_path):
    header = bytearray(save_volume(tmp_path / "a.nii").read_bytes())
    header[70:72] = (999).to_bytes(2, "little")  # no code of a data type
    (tmp_path / "code.nii").write_bytes(header)
    nib.save(nib.Nifti1Image(np.ones((4, 5, 6), np.complex64), np.eye(4)), tmp_path / "complex.nii")
    colours = np.zeros((4, 5, 6), [(channel, "u1") for channel in "RGB"])
    nib.save(nib.Nifti1Image(colours, np.eye(4)), tmp_path / "colours.nii")
    for name, words in (("code", "999"), ("complex", "must be real"), ("colours", "must be real")):
        with pytest.raises(DataError, match=rf"{name}\.nii: .*{words}"):
            check_image(Case("case", (tmp_path / f"{name}.nii",)), ("A",))


def test_what_is_written_lies_on_the_grid_by_qform_and_by_sform(tmp_path):
    image = nib.Nifti1Image(np.ones((4, 5, 6), np.float32), np.diag([2.0, 1, 3, 1]))
    image.set_qform(np.diag([-2.0, -1, 3, 1]), code=1)
    image.set_sform(np.diag([2.0, 1, 3, 1]), code=4)
    nib.save(image, tmp_path / "image.nii")
    write_volume(np.ones((4, 5, 6), np.uint8), tmp_path / "image.nii", tmp_path / "label.nii.gz")
    label = nib.load(tmp_path / "label.nii.gz")
    for form in ("get_qform", "get_sform"):
        wanted, code = getattr(image, form)(coded=True)
        found, found_code = getattr(label, form)(coded=True)
        np.testing.assert_allclose(found, wanted)
        assert found_code == code


IMAGE = np.random.default_rng(0).normal(100, 15, (8, 7, 6)).astype(np.float32)
LABEL = (IMAGE > 110).astype(np.uint8)
TASK = Task("t", ("MRI",), {0: "background", 1: "a"}, ())


@pytest.mark.parametrize(("unit", "length"), [("mm", 1.0), ("micron", 1000.0), ("meter", 1e-3), (None, 1.0)])
def test_lengths_are_in_mm(tmp_path, unit, length):
    case = labelled(tmp_path, IMAGE, LABEL, np.diag([2 * length, length, length, 1.0]), unit)
    assert check_case(TASK, case).spacing == pytest.approx((2, 1, 1))
    written = on_grid_of(LABEL, case.image)
    assert written.header["xyzt_units"] == nib.load(case.image).header["xyzt_units"]


@pytest.mark.parametrize(
    ("unit", "length", "words"),
    [
        ("meter", 1.0, "are 1000 x 1000 x 1000 mm large, by a header in metres"),
        ("micron", 1.0, "are 0.001 x 0.001 x 0.001 mm large, by a header in micrometres"),
        (
            "mm",
            101.0,
            "are 101 x 101 x 101 mm large, by a header in mm; they must be between 0.01 and 100 mm",
        ),
    ],
)
def test_voxels_of_no_scanner(tmp_path, unit, length, words):
    case = labelled(tmp_path, IMAGE, LABEL, np.diag([length, length, length, 1.0]), unit)
    with pytest.raises(DataError, match=f"image.nii.gz: its voxels {words}"):
        check_case(TASK, case)


def sloped(values, slope, intercept=0.0):
    image = nib.Nifti1Image(values, np.eye(4))
    image.header.set_slope_inter(np.float32(slope), intercept)
    return image


@pytest.mark.parametrize(
    "label",
    [
        sloped(LABEL * np.uint8(255), 1 / 255),
        sloped(LABEL * np.uint8(42), 1 / 42.4),  # no step of the file comes closer to 1
        LABEL * np.float32(0.99999994),
        LABEL * np.float64(0.99999994),
        LABEL * np.float32(1.0000001),
        LABEL.astype(np.int16),
        LABEL.astype(np.float32),
        LABEL[..., None],
        LABEL[..., None, None],
    ],
)
def test_labels_to_within_rounding(tmp_path, label):
    found = check_label(labelled(tmp_path, IMAGE, label), [0, 1])
    np.testing.assert_array_equal(found, LABEL)
    assert found.dtype == np.uint8


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (LABEL * np.float32(0.9882), r"label value 0\.98820\d+ has no class; there are classes for \[0, 1\]"),
        (sloped(LABEL * np.uint8(252), 1 / 255), r"label value 0\.9882\d+ has no class"),
        (LABEL * np.float32(1.001), r"label value 1\.00\d+ has no class"),
        (LABEL.astype(np.int16) * 256, "label value 256 has no class"),
        (-LABEL.astype(np.int16), "label value -1 has no class"),
        (np.where(LABEL > 0, np.nan, 0), "holds NaN or infinite values; a label must be a whole number"),
        (np.where(LABEL > 0, np.inf, 0), "holds NaN or infinite values"),
        (np.stack([LABEL, LABEL], -1), "must be X, Y, Z, one value for a voxel"),
    ],
)
def test_labels_that_stand_for_nothing(tmp_path, label, words):
    with pytest.raises(DataError, match=words):
        check_label(labelled(tmp_path, IMAGE, label), [0, 1])


def test_axes_of_length_one(tmp_path):
    for image in (IMAGE[..., None], IMAGE[..., None, None]):
        _, voxels = check_image(labelled(tmp_path, image, LABEL), ("MRI",))
        np.testing.assert_array_equal(voxels[..., 0], IMAGE)
    both = np.stack([IMAGE, IMAGE + 1], -1)[:, :, :, None]
    _, voxels = check_image(labelled(tmp_path, both, LABEL), ("A", "B"))
    assert voxels.shape == (8, 7, 6, 2)


def test_analyze_has_no_sides(tmp_path):
    nib.save(nib.AnalyzeImage(IMAGE, np.eye(4)), tmp_path / "a.img")
    with pytest.raises(DataError, match="no NIfTI: it does not say which side is left"):
        check_image(Case("a", (tmp_path / "a.img",)), ("MRI",))


def ball(affine, shape):
    """A ball in world coordinates, sampled on a grid; soft, so that interpolation can be exact."""
    places = np.stack(np.meshgrid(*map(np.arange, shape), [1], indexing="ij"), -1)[..., 0, :] @ affine.T
    radius = np.linalg.norm(places[..., :3] - (12, 11, 10), axis=-1)
    return (200 * np.exp(-((radius / 5) ** 2)) + 20).astype(np.float32)


def test_modalities_are_brought_to_one_grid(tmp_path):
    fine = np.diag([1.0, 1, 1, 1])
    coarse = np.array([[0, 0, 3.0, 1], [-0.8, 0, 0, 22], [0, 0.8, 0, 0.5], [0, 0, 0, 1]])
    grids = {"a": (fine, (24, 22, 20)), "b": (coarse, (28, 25, 8))}
    paths = []
    for name, (affine, shape) in grids.items():
        paths.append(tmp_path / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(ball(affine, shape), affine), paths[-1])
    case = Case("case", tuple(paths))
    with pytest.raises(
        DataError, match=r"b.nii.gz: shape .* With --resample first, or the name of a modality"
    ):
        check_image(case, ("A", "B"))
    for wish, (affine, shape) in (("first", grids["a"]), ("A", grids["a"]), ("b", grids["b"])):
        (moved,) = with_grid([case], ("A", "B"), wish)
        found, image = check_image(moved, ("A", "B"))
        np.testing.assert_allclose(found, affine)
        assert image.shape == (*shape, 2)
        there = (image != 0).all(axis=3)
        assert there.mean() > 0.7
        apart = np.abs(image[..., 0] - image[..., 1])[there]
        assert apart.mean() < 2
        assert np.quantile(apart, 0.99) < 15
    with pytest.raises(DataError, match="resample: got 'C'; it must be first, or one of A, B"):
        with_grid([case], ("A", "B"), "C")


@pytest.mark.parametrize("spacing", [(0.7, 0.9, 1.5), (2.5, 3.0, 6.0)])
def test_no_ring_at_the_edge_of_the_head(tmp_path, spacing):
    """A bright spot elsewhere gives an overshoot room: it is the values around a place that bound it."""
    first = np.diag([*spacing, 1.0])
    first[:3, :3] = nib.eulerangles.euler2mat(0.2) @ first[:3, :3]
    flair = np.full((30, 30, 14), 20, np.float32)
    flair[6:24, 6:24, 3:11] = 500
    flair[14, 14, 7] = 3000
    for name, voxels, affine in (
        ("a", np.ones((20, 20, 12), np.float32), first),
        ("b", flair, np.diag([1.5, 1.5, 4, 1])),
    ):
        nib.save(nib.Nifti1Image(voxels, affine), tmp_path / f"{name}.nii.gz")
    case = Case("case", (tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"), resample=True)
    affine, image = check_image(case, ("T1", "FLAIR"))
    moved = image[..., 1]
    voxels = np.stack(np.meshgrid(*map(np.arange, moved.shape), [1], indexing="ij"), -1)[..., 0, :]
    places = voxels @ (np.linalg.inv(np.diag([1.5, 1.5, 4, 1])) @ affine).T
    far = np.abs(places[..., :3] - (14, 14, 7)).max(axis=-1) > 5
    values = moved[far & (moved != 0)]
    assert len(values) > 500
    assert (values > 400).any()
    assert values.min() > 19.9
    assert values.max() < 500.1 if min(spacing) < 1 else values.max() < 510  # smoothed, the spot reaches far


def test_axes_stored_in_another_order_or_direction(tmp_path):
    """The same grid: every voxel goes where it belongs, and nothing is interpolated."""
    voxels = np.random.default_rng(0).gamma(5, 100, (6, 7, 8)).astype(np.float32)
    labels = (voxels > 600).astype(np.uint8)
    flipped = np.array([[-2.0, 0, 0, 10], [0, 1, 0, 0], [0, 0, 3, 0], [0, 0, 0, 1]])
    turned = np.array([[0.0, 2, 0, 0], [0, 0, 1, 0], [3, 0, 0, 0], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 1, 3, 1])), tmp_path / "a.nii.gz")
    nib.save(nib.Nifti1Image(voxels[::-1] + 1, flipped), tmp_path / "b.nii.gz")
    nib.save(nib.Nifti1Image(labels.transpose(2, 0, 1), turned), tmp_path / "label.nii.gz")
    case = Case("case", (tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"), tmp_path / "label.nii.gz")
    np.testing.assert_array_equal(check_image(case, ("A", "B"))[1], np.stack([voxels, voxels + 1], -1))
    np.testing.assert_array_equal(check_label(case, [0, 1]), labels)
    nib.save(nib.Nifti1Image(labels[::-1], np.diag([-2.0, 1, 3, 1])), tmp_path / "label.nii.gz")
    with pytest.raises(DataError, match=r"its affine differs .* bring the one that is off to the other's"):
        check_label(case, [0, 1])


@pytest.mark.parametrize("degrees", [45, 135, 225, -45])
def test_a_label_whose_header_rounds_otherwise_at_45_degrees(tmp_path, degrees):
    """sform and qform differ in the last digits, and the axes of both lie halfway between the scanner's."""
    labels = np.random.default_rng(0).integers(0, 3, (6, 7, 8), dtype=np.uint8)
    for axis in "xyz":
        turned = Rotation.from_euler(axis, degrees, degrees=True).as_matrix()
        affine = nib.affines.from_matvec(turned @ np.diag([1, 1, 2]), (3, -4, 5))
        nib.save(nib.Nifti1Image(labels + 1.0, affine), tmp_path / "image.nii.gz")
        label = nib.Nifti1Image(labels, affine)
        label.set_qform(affine, 1)
        label.set_sform(None, 0)
        nib.save(label, tmp_path / "label.nii.gz")
        case = Case("case", (tmp_path / "image.nii.gz",), tmp_path / "label.nii.gz")
        np.testing.assert_array_equal(check_label(case, [0, 1, 2]), labels)


def test_modalities_of_different_places(tmp_path):
    voxels = np.random.default_rng(0).gamma(5, 100, (6, 7, 8)).astype(np.float32)
    places = {"first": 0, "near": 4, "far": 500}
    for name, place in places.items():
        affine = np.eye(4)
        affine[0, 3] = place
        nib.save(nib.Nifti1Image(voxels, affine), tmp_path / f"{name}.nii.gz")
    near, far = (
        Case(name, (tmp_path / "first.nii.gz", tmp_path / f"{name}.nii.gz"), resample=True)
        for name in ("near", "far")
    )
    (told,) = doubts_of_files([near])
    assert (
        "covers less than half of the grid that it is brought to in 1 case; the rest of it is 0: near" in told
    )
    assert check_image(near, ("A", "B"))[1][..., 1].any()
    with pytest.raises(DataError, match=r"far.nii.gz: has nothing where .*first.nii.gz is"):
        check_image(far, ("A", "B"))


def test_a_label_beyond_every_class_is_refused(tmp_path):
    nib.save(nib.Nifti1Image(np.full((2, 2, 2), 1e20, np.float32), np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(DataError, match="is not a whole number below"):
        read_labels(tmp_path / "a.nii.gz", None)
