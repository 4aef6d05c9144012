"""DICOM series, NRRD and MetaImage: the volumes and label maps of NIfTI, and errors in words."""

import re
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from factorizer_support import checkpoint_for, plan_for, run_command, write_series
from scipy.spatial.transform import Rotation

from factorizer.commands.predict import _write_also
from factorizer.segmentation.cases import find_cases
from factorizer.segmentation.dicom import write_segmentation
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.formats import load, parts_of, save
from factorizer.segmentation.survey import doubts_of_files
from factorizer.segmentation.volumes import on_grid_of, read_volume, write_volume

highdicom, pydicom, sitk = map(pytest.importorskip, ("highdicom", "pydicom", "SimpleITK"))  # the extra io

HIPPOCAMPUS = Path(__file__).parents[4] / "shared/data/Task04_Hippocampus/imagesTr"
TURNED = nib.affines.from_matvec(
    Rotation.from_euler("xyz", [20, -10, 5], degrees=True).as_matrix() @ np.diag([-0.9, 1.1, 2.5]),
    [10, 20, -30],
)


def volume_of(shape=(12, 14, 9), affine=TURNED, seed=0):
    voxels = np.random.default_rng(seed).integers(1, 2000, shape).astype(np.int16)
    return nib.Nifti1Image(voxels, affine)


def in_order_of(volume, like):
    turn = nib.orientations.ornt_transform(nib.io_orientation(volume.affine), nib.io_orientation(like.affine))
    return volume.as_reoriented(turn)


def assert_same(volume, expected):
    volume = in_order_of(volume, expected)
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(volume.dataobj), np.asarray(expected.dataobj))


def test_a_series_is_the_volume_that_it_was_made_of(tmp_path):
    volume = volume_of()
    series = write_series(tmp_path / "series", volume)
    assert_same(load(series), volume)
    slope = write_series(tmp_path / "scaled", volume, RescaleSlope="2", RescaleIntercept="-1000")
    np.testing.assert_array_equal(read_volume(slope)[1], 2 * read_volume(series)[1] - 1000)
    assert len(parts_of(series)) == 9


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".MHA"])
def test_itk_files_are_what_itk_says(tmp_path, ending):
    volume = volume_of()
    nib.save(volume, tmp_path / "a.nii.gz")
    image = sitk.ReadImage(str(tmp_path / "a.nii.gz"))
    sitk.WriteImage(image, str(tmp_path / f"a{ending.lower()}"))
    path = (tmp_path / f"a{ending.lower()}").rename(tmp_path / f"b{ending}")
    found = load(path)
    assert found.get_data_dtype() == np.int16
    assert_same(found, volume)
    save(found, tmp_path / f"again{ending.lower()}")
    written = sitk.ReadImage(str(tmp_path / f"again{ending.lower()}"))
    np.testing.assert_allclose(written.GetDirection(), image.GetDirection(), atol=1e-6)
    np.testing.assert_allclose(written.GetOrigin(), image.GetOrigin(), atol=1e-5)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(written), sitk.GetArrayFromImage(image))
    both = sitk.Compose(image, image * 2)
    sitk.WriteImage(both, str(tmp_path / f"two{ending.lower()}"))
    voxels = np.asarray(load(tmp_path / f"two{ending.lower()}").dataobj)
    np.testing.assert_array_equal(voxels, np.stack([volume.dataobj, 2 * np.asarray(volume.dataobj)], axis=3))


def test_itk_files_are_in_millimetres(tmp_path):
    volume = volume_of()
    expected = nib.affines.voxel_sizes(volume.affine)
    for unit, length in (("micron", 1e-3), ("meter", 1e3)):
        volume.header.set_xyzt_units(unit)
        save(volume, tmp_path / "a.nrrd")
        spacing = sitk.ReadImage(str(tmp_path / "a.nrrd")).GetSpacing()
        np.testing.assert_allclose(spacing, expected * length, rtol=1e-6)


@pytest.mark.parametrize(
    ("ending", "silent", "telling"),
    [
        ("nrrd", "spacings: 1 2 3\n", "space: LPS\nspace directions: (1,0,0) (0,2,0) (0,0,3)\n"),
        ("nrrd", "space dimension: 3\nspace directions: (1,0,0) (0,2,0) (0,0,3)\n", None),
        ("mha", "ElementSpacing = 1 2 3\n", "TransformMatrix = 1 0 0 0 1 0 0 0 1\nElementSpacing = 1 2 3\n"),
    ],
)
def test_itk_files_that_do_not_say_which_side_is_left(tmp_path, ending, silent, telling):
    before, after = {
        "nrrd": ("NRRD0004\ntype: float\ndimension: 3\nsizes: 4 5 6\nendian: little\nencoding: raw\n", "\n"),
        "mha": (
            "ObjectType = Image\nNDims = 3\nDimSize = 4 5 6\n",
            "ElementType = MET_FLOAT\nElementDataFile = LOCAL\n",
        ),
    }[ending]
    for name, fields in (("silent", silent), ("telling", telling or silent)):
        content = f"{before}{fields}{after}".encode() + np.ones(120, "<f4").tobytes()
        (tmp_path / f"{name}.{ending}").write_bytes(content)
    cases = find_cases(sorted(tmp_path.iterdir()))
    (doubt,) = doubts_of_files(cases)
    assert re.search("does not say which side is left .* in 1 case" if telling else "in 2 cases", doubt)
    assert doubt.endswith("silent" if telling else "silent, telling")
    # And its results lie where programs that use ITK show it.
    write_volume(np.ones((4, 5, 6), np.uint8), cases[0].image, tmp_path / "labels.nii.gz")
    labels = nib.load(tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(labels.affine, np.diag([-1.0, -2, 3, 1]))
    np.testing.assert_array_equal(labels.affine, load(cases[0].image).affine)
    np.testing.assert_allclose(labels.get_qform(), labels.affine, atol=1e-6)


def predicted(folder, model, files, *options):
    inputs = [part for file in files for part in ("--input", file)]
    run_command("predict", *model, *inputs, "--output", folder / "out", *options)
    return [nib.load(folder / "out" / f"{file.name.split('.')[0]}.nii.gz") for file in files]


def check_formats(folder, volume, model, names):
    """Files of one volume, and a series, give one label map, and its copies hold what it holds."""
    series = write_series(folder / "series", volume)
    expected, *others = predicted(folder, model, [folder / name for name in names])
    assert len(np.unique(expected.dataobj)) > 1
    for labels in others:
        np.testing.assert_allclose(labels.affine, expected.affine, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(labels.dataobj), np.asarray(expected.dataobj))

    also = [part for name in ("nrrd", "mha", "dicom-seg") for part in ("--also", name)]
    (labels,) = predicted(folder, model, [series], *also)
    turned = in_order_of(labels, expected)
    np.testing.assert_allclose(turned.affine, expected.affine, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(turned.dataobj), np.asarray(expected.dataobj))
    for ending in ("nrrd", "mha"):
        assert_same(load(folder / "out" / ending / f"series.{ending}"), labels)
    check_segmentation(folder / "out" / "dicom-seg" / "series.dcm", series, labels)
    predicted(folder, model, [series])
    assert not list((folder / "out" / "dicom-seg").glob("*.dcm"))  # of another command


def check_segmentation(path, series, labels):
    """What another program reads from a DICOM-SEG is the label map, on the series that it names."""
    segmentation = highdicom.seg.segread(path)
    assert [segment.SegmentNumber for segment in segmentation.SegmentSequence] == [1, 2]
    images = [pydicom.dcmread(file) for file in parts_of(series)]
    assert segmentation.StudyInstanceUID == images[0].StudyInstanceUID
    assert segmentation.PatientID == images[0].PatientID
    assert segmentation.FrameOfReferenceUID == images[0].FrameOfReferenceUID
    source = highdicom.get_volume_from_series(images)
    found = segmentation.get_volume(combine_segments=True).match_geometry(source)
    affine = np.diag([-1.0, -1, 1, 1]) @ found.affine
    assert_same(nib.Nifti1Image(found.array.astype(np.uint8), affine), labels)


def test_all_formats_give_one_label_map(tmp_path):
    plan = plan_for(("MRI",), {0: "background", 1: "front", 2: "back"})
    volume = volume_of((15, 12, 18), nib.affines.from_matvec(np.diag([-1, 1.2, 1.1]), (20, -30, 5)))
    nib.save(volume, tmp_path / "plain.nii.gz")
    nib.save(volume, tmp_path / "CAPITALS.NII.GZ")
    nib.save(nib.Nifti1Pair(np.asarray(volume.dataobj), volume.affine), tmp_path / "pair.img")
    for ending in ("nrrd", "mha"):
        save(volume, tmp_path / f"by_{ending}.{ending}")
    names = ("plain.nii.gz", "CAPITALS.NII.GZ", "pair.hdr", "by_nrrd.nrrd", "by_mha.mha")
    model = ("--checkpoint", checkpoint_for(plan, tmp_path / "checkpoint.pt"))
    check_formats(tmp_path, volume, model, names)


def segments_of(path):
    """The names of a DICOM-SEG's segments, their types and the number of their voxels."""
    segmentation = highdicom.seg.segread(path)
    found = {}
    for number in segmentation.segment_numbers:
        told = segmentation.get_segment_description(number)
        mask = segmentation.get_volume(segment_numbers=[number]).array
        found[told.segment_label] = (told.segmented_property_type.value, int(mask.sum()))
    return found


def test_segments_of_nested_regions_overlap(tmp_path):
    series = write_series(tmp_path / "series", volume_of())
    regions = {"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}
    labels = {0: "background", 1: "edema", 2: "necrosis", 3: "enhancing"}
    plan = plan_for(("T1",), labels, regions)
    voxels = np.zeros((12, 14, 9), np.uint8)
    voxels[1:9, 1:9, 1:7], voxels[2:6, 2:6, 2:5], voxels[3:5, 3:5, 3] = 1, 2, 3
    case = find_cases([series])[0]
    _write_also("dicom-seg", on_grid_of(voxels, series), case, plan, tmp_path / "a.dcm")
    assert segments_of(tmp_path / "a.dcm") == {
        "whole": ("1+2+3", 384),
        "core": ("2+3", 48),
        "enhancing": ("3", 4),
    }
    _write_also("dicom-seg", on_grid_of(voxels * 0, series), case, plan, tmp_path / "none.dcm")
    assert [count for _, count in segments_of(tmp_path / "none.dcm").values()] == [0, 0, 0]


@pytest.mark.parametrize("characters", [None, "ISO_IR 6", "ISO_IR 100", ["", "ISO 2022 IR 87"]])
def test_segmentations_of_series_in_any_characters(tmp_path, characters):
    patient = "Yamada^Tarou=山田^太郎" if isinstance(characters, list) else "A^B"
    tags = {} if characters is None else {"SpecificCharacterSet": characters}
    series = write_series(tmp_path / "series", volume_of(), **tags, PatientName=patient)
    labels = on_grid_of(np.ones((12, 14, 9), np.uint8), series)
    write_segmentation(labels, series, {"Läsion": (1,), "腫瘍": (2,)}, tmp_path / "a.dcm")
    written = pydicom.dcmread(tmp_path / "a.dcm")
    assert [segment.SegmentLabel for segment in written.SegmentSequence] == ["Läsion", "腫瘍"]
    assert str(written.PatientName) == patient


ANONYMISED = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
)
ANONYMISED += ("AccessionNumber", "ReferringPhysicianName", "SliceThickness")


def test_segmentations_of_anonymised_series(tmp_path):
    series = write_series(tmp_path / "series", volume_of())
    edited(lambda image, k: [delattr(image, tag) for tag in ANONYMISED])(series, parts_of(series))
    labels = on_grid_of(np.ones((12, 14, 9), np.uint8), series)
    write_segmentation(labels, series, {"all": (1,)}, tmp_path / "a.dcm")
    assert segments_of(tmp_path / "a.dcm") == {"all": ("1", 12 * 14 * 9)}
    written = pydicom.dcmread(tmp_path / "a.dcm")
    assert not any(written[tag].value for tag in ANONYMISED[:-1])
    (measures,) = written.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
    assert measures.SliceThickness == 2.5  # the distance of slices


@pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason="the Decathlon's hippocampus is not here")
def test_an_mri_gives_one_label_map(tmp_path):
    volume = nib.load(min(HIPPOCAMPUS.glob("*.nii.gz")))
    nib.save(volume, tmp_path / "plain.nii.gz")
    check_formats(tmp_path, volume, ("--model", "hippocampus"), ("plain.nii.gz",))


def without(*slices):
    def change(folder, files):
        for k in slices:
            files[k].unlink()

    return change


def edited(change, *slices):
    """A change of the headers of some slices, of all by default."""

    def edit(folder, files):
        for k, file in enumerate(files):
            if not slices or k in slices:
                image = pydicom.dcmread(file)
                change(image, k)
                image.save_as(file)

    return edit


def move(image, by):
    image.ImagePositionPatient = [float(x) + d for x, d in zip(image.ImagePositionPatient, by, strict=True)]


def beside(folder, files):
    write_series(folder / "more", volume_of(), SeriesDescription="localizer")
    for file in (folder / "more").iterdir():
        file.rename(folder / f"b{file.name}")
    (folder / "more").rmdir()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without(4), r"series: 1 slice is missing between 7.50 and 12.50 mm, where slices are 2.5 mm apart"),
        (without(3, 4), "series: 2 slices are missing between"),
        (edited(lambda image, k: move(image, (0, 0, 0.7)), 4), "unevenly spaced, 1.8 to 3.2 mm apart"),
        (edited(lambda image, k: move(image, (0, k * 0.4, 0))), r"at 9.1 degrees .* \(gantry tilt\)"),
        (beside, r"holds 2 DICOM series: 'T1' \(9 images\), 'localizer' \(9 images\)"),
        (edited(lambda image, k: move(image, (0, 0, -2.5)), 4), "several slices of one place"),
        (
            edited(lambda image, k: setattr(image, "ImageOrientationPatient", [1, 0, 0, 0, 0, -1]), 8),
            "different directions",
        ),
        (edited(lambda image, k: setattr(image, "PixelSpacing", [2, 2]), 3), "different pixel spacings"),
        (edited(lambda image, k: setattr(image, "Rows", 7), 3), "different sizes: .*7.* and"),
        (without(*range(1, 9)), "holds one slice"),
        (edited(lambda image, k: setattr(image, "SamplesPerPixel", 3)), "in colour"),
        (edited(lambda image, k: setattr(image, "PhotometricInterpretation", "PALETTE COLOR")), "in colour"),
        (edited(lambda image, k: setattr(image, "NumberOfFrames", 3)), "holds several frames"),
        (edited(lambda image, k: delattr(image, "PixelSpacing")), "headers lack what a volume needs"),
        (
            edited(lambda image, k: setattr(image, "ImagePositionPatient", None), 2),
            "IM.*: its DICOM tag ImagePositionPatient is .*; it must be 3 numbers",
        ),
        (
            edited(lambda image, k: setattr(image, "ImagePositionPatient", [1, 2]), 2),
            "its DICOM tag ImagePositionPatient",
        ),
        (
            edited(lambda image, k: setattr(image, "ImageOrientationPatient", [1, 0, 0])),
            r"its DICOM tag ImageOrientationPatient is .*1.*0.*0.*; it must be 6 numbers",
        ),
        (edited(lambda image, k: setattr(image, "PixelSpacing", [1])), "its DICOM tag PixelSpacing"),
        (
            edited(
                lambda image, k: [setattr(image, f"Rescale{tag}", "") for tag in ("Slope", "Intercept")], 2
            ),
            "IM.*: its DICOM tag RescaleSlope is .*; it must be 1 number$",
        ),
        (edited(lambda image, k: setattr(image, "Rows", None)), "headers lack what a volume needs"),
        (edited(lambda image, k: delattr(image, "ImagePositionPatient")), "holds no DICOM images"),
        (edited(lambda image, k: setattr(image, "PixelData", b"12")), "IM.*: not readable as DICOM"),
        (lambda folder, files: [f.write_bytes(f.read_bytes()[:140]) for f in files], "not readable|no DICOM"),
    ],
)
def test_a_series_that_is_no_volume(tmp_path, change, words):
    series = write_series(tmp_path / "series", volume_of(affine=np.diag([-1, -1, 2.5, 1]) + np.eye(4, k=3)))
    places = {float(pydicom.dcmread(file).ImagePositionPatient[2]): file for file in parts_of(series)}
    change(series, [places[height] for height in sorted(places)])
    with pytest.raises(DataError, match=words):
        read_volume(series)


def cut(size, start=0):
    """A change of the last file by name: it is left with its bytes from `start` to `size`."""

    def change(files):
        files[-1].write_bytes(files[-1].read_bytes()[start:size])

    return change


def linked_to_nowhere(files):
    files[-1].unlink()
    files[-1].symlink_to("nowhere")


def lacking(*tags):
    def change(files):
        image = pydicom.dcmread(files[-1])
        for tag in tags:
            delattr(image, tag)
        image.save_as(files[-1])

    return change


@pytest.mark.parametrize("names", ["IM{:04d}", "1.2.840.{}.dcm", "{:08x}", "MR.1.{}.7"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (cut(0), "called like the slices .*: it is empty"),
        (cut(100), "called like the slices .*: it has no DICM after its first 128 bytes"),
        (cut(None, start=132), "called like the slices .*: it has no DICM"),
        (linked_to_nowhere, "called like the slices .*: it cannot be opened"),
        (cut(140), "not readable as DICOM"),
        (cut(400), "not readable as DICOM"),
        (cut(-200), "not readable as DICOM"),
        (lacking("Rows"), "not readable as DICOM .*no tag Rows"),
        (lacking("ImagePositionPatient"), "without the DICOM tag ImagePositionPatient; each slice"),
        (lacking("ImageOrientationPatient", "SOPClassUID"), "without the DICOM tag ImageOrientationPatient"),
    ],
)
def test_a_broken_slice_at_the_end_is_not_left_out(tmp_path, names, change, words):
    series = write_series(tmp_path / "series", volume_of((6, 7, 5)))
    heights = {float(pydicom.dcmread(file).ImagePositionPatient[2]): file for file in parts_of(series)}
    files = [heights[z].rename(series / names.format(k + 9)) for k, z in enumerate(sorted(heights))]
    change(files)
    with pytest.raises(DataError, match=f"{re.escape(str(files[-1]))}: .*{words}"):
        read_volume(series)


def test_other_files_beside_the_slices(tmp_path):
    volume = volume_of((6, 7, 5))
    series = write_series(tmp_path / "series", volume)
    for name in ("README.txt", "LICENSE", "DICOMDIR", "IM0007.json", "._IM0007", ".DS_Store", "VERSION2"):
        (series / name).write_bytes(b"")
    for name, kind, gone in (
        ("report", "1.2.840.10008.5.1.4.1.1.88.11", ("Rows", "PixelData")),  # Basic Text SR, of another class
        ("screen", pydicom.uid.SecondaryCaptureImageStorage, ("ImagePositionPatient",)),
        ("directory", None, ("Rows", "PixelData")),
    ):
        other = pydicom.dcmread(series / "IM0007")
        for tag in ("ImageOrientationPatient", *gone):
            delattr(other, tag)
        if kind:
            other.SOPClassUID = other.file_meta.MediaStorageSOPClassUID = pydicom.uid.UID(kind)
        else:
            del other.SOPClassUID
            other.file_meta.MediaStorageSOPClassUID = pydicom.uid.MediaStorageDirectoryStorage
        other.save_as(series / name)
    other = pydicom.dcmread(series / "IM0007")  # of another series
    other.SeriesInstanceUID = pydicom.uid.generate_uid()
    del other.ImagePositionPatient
    other.save_as(series / "IM0100")
    assert_same(load(series), volume)


def test_positions_rounded_to_a_tenth_of_a_millimetre_are_even(tmp_path):
    volume = volume_of((6, 6, 40), np.diag([-1, -1, 0.625, 1]))
    series = write_series(tmp_path / "series", volume)
    for file in parts_of(series):
        image = pydicom.dcmread(file)
        image.ImagePositionPatient = [round(float(x), 1) for x in image.ImagePositionPatient]
        image.save_as(file)
    np.testing.assert_allclose(load(series).affine, volume.affine, atol=0.05)


@pytest.mark.parametrize("content", [b"", b"NRRD0004\ntype: short\n", "truncated"])
@pytest.mark.parametrize("ending", ["nrrd", "mha"])
def test_unreadable_itk_files(tmp_path, content, ending):
    path = tmp_path / f"a.{ending}"
    save(volume_of(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "truncated" else content)
    with pytest.raises(DataError, match=rf"a.{ending}: not readable as {ending.upper()}"):
        read_volume(path)


def test_an_itk_file_of_a_plane_or_that_is_not_there(tmp_path):
    sitk.WriteImage(sitk.Image((4, 5), sitk.sitkInt16), str(tmp_path / "a.mha"))
    with pytest.raises(DataError, match=r"a.mha: has 2 axes"):
        load(tmp_path / "a.mha")
    with pytest.raises(DataError, match=r"b.nrrd: there is no such file"):
        load(tmp_path / "b.nrrd")


@pytest.mark.parametrize(("module", "path"), [("pydicom", "series"), ("SimpleITK", "a.nrrd")])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, module, path):
    write_series(tmp_path / "series", volume_of())
    save(volume_of(), tmp_path / "a.nrrd")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=rf"{path}: needs {module}: pip install .*\[io\]"):
        load(tmp_path / path)


def test_series_among_the_inputs(tmp_path):
    for name in ("b", "a"):
        write_series(tmp_path / "all" / name, volume_of())
    assert [case.name for case in find_cases([tmp_path / "all"])] == ["a", "b"]
    assert [case.name for case in find_cases([tmp_path / "all" / "b"])] == ["b"]
    (case,) = find_cases([f"{tmp_path}/all/a,{tmp_path}/all/b"])
    assert [path.name for path in case.images] == ["a", "b"]
    one = parts_of(tmp_path / "all" / "a")[0]
    with pytest.raises(DataError, match="is no NIfTI file"):
        find_cases([one])
    save(volume_of(), tmp_path / "all" / "a" / "c.nrrd")
    with pytest.raises(DataError, match="holds volumes and a DICOM series"):
        find_cases([tmp_path / "all" / "a"])
    shutil.rmtree(tmp_path / "all" / "b")
    (tmp_path / "all" / "b").mkdir()
    with pytest.raises(DataError, match="holds no volume, but folders"):
        find_cases([tmp_path / "all"])


def test_formats_that_cannot_be_written(tmp_path):
    checkpoint = checkpoint_for(plan_for(("MRI",)), tmp_path / "checkpoint.pt")
    nib.save(volume_of(), tmp_path / "a.nii.gz")
    series = write_series(tmp_path / "series", volume_of())
    options = ["predict", "--checkpoint", checkpoint, "--output", tmp_path / "out", "--input"]
    printed = run_command(*options, tmp_path / "a.nii.gz", "--also", "dicom-seg", code=2)
    assert "also: dicom-seg needs the DICOM series that was segmented; a is in another format" in printed
    assert "also: got 'png'; it must be one of nrrd, mha, dicom-seg" in run_command(
        *options, tmp_path / "a.nii.gz", "--also", "png", code=2
    )
    printed = run_command(
        "predict", "--checkpoint", checkpoint, "--output", series, "--input", series, code=2
    )
    assert "series holds the inputs" in printed
