"""What is read from and written to NIfTI files, and what is wrong with them."""

import shutil

import nibabel as nib
import numpy as np
import pytest
from factorizer_support import save_volume

from factorizer.segmentation.cases import Case, Task, read_decathlon
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.volumes import check_case, check_image, write_nifti


@pytest.fixture
def folder(synthetic, tmp_path):
    return shutil.copytree(synthetic, tmp_path / "task")


def check_all(folder):
    task = read_decathlon(folder)
    return [check_case(task, case) for case in task.cases]


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


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("labelsTr", lambda x: x[:-1], r"labelsTr/.*shape .* does not match"),
        ("imagesTr", lambda x: x[..., :1], "1 channels; there must be one for each of the 2 modalities"),
        ("imagesTr", lambda x: x[..., 0], "1 channels; there must be one for each of the 2 modalities"),
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
    with pytest.raises(DataError, match="its affine differs from its image's"):
        check_all(folder)


def write_case(folder, image, label, affine):
    paths = folder / "image.nii.gz", folder / "label.nii.gz"
    for path, volume in zip(paths, (image, label), strict=True):
        nib.save(nib.Nifti1Image(volume, affine), path)
    return Case("case", paths[:1], paths[1])


def test_geometry_is_told_in_canonical_axes(tmp_path):
    # Array axes run superior, left, posterior, 2, 3 and 4 mm apart.
    affine = np.array([[0, -3, 0, 5], [0, 0, -4, 6], [2, 0, 0, 7], [0, 0, 0, 1]], dtype=float)
    label = np.zeros((4, 5, 6), dtype=np.uint8)
    case = write_case(tmp_path, label.astype(np.float32) + 1, label, affine)
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
    write_nifti(np.ones((4, 5, 6), np.uint8), tmp_path / "image.nii", tmp_path / "label.nii.gz")
    label = nib.load(tmp_path / "label.nii.gz")
    for form in ("get_qform", "get_sform"):
        wanted, code = getattr(image, form)(coded=True)
        found, found_code = getattr(label, form)(coded=True)
        np.testing.assert_allclose(found, wanted)
        assert found_code == code
