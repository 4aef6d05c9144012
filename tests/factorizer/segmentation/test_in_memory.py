"""Volumes in memory are segmented as files are, and what cannot be used is told by the argument's name."""

import builtins
import sys

import nibabel as nib
import numpy as np
import pytest
from factorizer_support import MODALITIES, ODD, REGIONS, TUMOUR, checkpoint_for, plan_for, run_command

import factorizer
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.inference import load_predictor

SHAPE = (15, 20, 17)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("in_memory")


@pytest.fixture(scope="module")
def tumour(folder):
    plan = plan_for(MODALITIES, TUMOUR, REGIONS, {"num_deep_supr": 1}, flips=(0, 1))
    return checkpoint_for(plan, folder / "tumour.pt")


@pytest.fixture(scope="module")
def single(folder):
    return checkpoint_for(plan_for(("MRI",), {0: "background", 2: "a", 5: "b"}), folder / "single.pt")


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return {name: rng.gamma(2, 100, SHAPE).astype(np.float32) for name in MODALITIES}


def test_every_kind_of_image_gives_what_the_command_gives(tumour, arrays, tmp_path):
    (tmp_path / "in").mkdir()
    for k, voxels in enumerate(arrays.values()):
        nib.save(nib.Nifti1Image(voxels, ODD), tmp_path / "in" / f"a_{k:04d}.nii.gz")
    options = ["--input", tmp_path / "in", "--output", tmp_path / "out", "--probabilities"]
    run_command("predict", "--checkpoint", tumour, *options)
    written = nib.load(tmp_path / "out" / "a.nii.gz")
    expected = np.asarray(written.dataobj)
    assert len(np.unique(expected)) > 1
    kept = np.load(tmp_path / "out" / "probabilities" / "a.npz")

    model = load_predictor([tumour])
    images = {name.upper(): nib.Nifti1Image(voxels, ODD) for name, voxels in arrays.items()}
    backwards = dict(reversed(images.items()))
    labels, chances = factorizer.segment(backwards, model, probabilities=True)
    assert isinstance(labels, nib.Nifti1Image)
    np.testing.assert_array_equal(labels.affine, ODD)
    np.testing.assert_array_equal(np.asarray(labels.dataobj), expected)
    assert list(chances) == kept["names"].tolist() == list(REGIONS)
    for own, known in zip(chances.values(), kept["probabilities"], strict=True):
        np.testing.assert_array_equal(own.affine, ODD)
        np.testing.assert_array_equal(np.asarray(own.dataobj).astype(np.float16), known)

    for image in (list(arrays.values()), np.stack([*arrays.values()], axis=3)):
        labels = factorizer.segment(image, model, affine=ODD)
        assert isinstance(labels, np.ndarray)
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, expected)


def test_spacing_is_an_affine_of_its_own(single, arrays):
    image = arrays["T2w"]
    labels = factorizer.segment(image, str(single), spacing=(1, 2, 1.5), device="cpu")
    assert set(np.unique(labels)) <= {0, 2, 5}
    again, chances = factorizer.segment(image, [single], affine=np.diag([1, 2, 1.5, 1]), probabilities=True)
    np.testing.assert_array_equal(again, labels)
    assert list(chances) == ["background", "a", "b"]
    np.testing.assert_allclose(sum(chances.values()), 1, atol=1e-5)
    assert labels.shape == chances["a"].shape == SHAPE


def test_modalities_are_brought_to_one_grid(tumour, arrays):
    images = {name: nib.Nifti1Image(voxels, np.eye(4)) for name, voxels in arrays.items()}
    other = np.diag([1.0, 1, 1.5, 1])
    images["T2w"] = nib.Nifti1Image(arrays["T2w"][:, :, :12], other)
    with pytest.raises(DataError, match=r"image\['T2w'\]: shape .* does not match .*image\['FLAIR'\]"):
        factorizer.segment(images, tumour)
    labels = factorizer.segment(images, tumour, resample="T2w")
    assert labels.shape == (15, 20, 12)
    np.testing.assert_array_equal(labels.affine, other)


def test_what_is_odd_is_a_warning(single):
    image = np.ones((16, 16, 16), np.float32)
    image[:, :, 8:] = 0
    image[4, 4, 4] = 2
    with pytest.warns(UserWarning, match="its voxels are 4 x 1 x 1 mm large") as told:
        factorizer.segment(image, single, spacing=(4, 1, 1))
    assert told[0].filename == __file__


@pytest.mark.parametrize("axes", [((0, -1), (1, 1), (2, 1)), ((2, 1), (0, -1), (1, -1))])
def test_left_stays_left_in_every_order_and_direction_of_the_axes(single, arrays, axes):
    model = load_predictor([single])
    image = nib.Nifti1Image(arrays["T2w"], nib.affines.from_matvec(np.diag([1, 2, 1.5]), (-7, 3, 5)))
    expected = factorizer.segment(image, model).as_reoriented(axes)
    turned = image.as_reoriented(axes)
    labels = factorizer.segment(turned, model)
    np.testing.assert_array_equal(labels.affine, expected.affine)
    np.testing.assert_array_equal(np.asarray(labels.dataobj), np.asarray(expected.dataobj))
    voxels = np.asarray(turned.dataobj)
    array = factorizer.segment(voxels, model, affine=turned.affine)
    np.testing.assert_array_equal(array, np.asarray(expected.dataobj))
    wrong = factorizer.segment(voxels, model, spacing=nib.affines.voxel_sizes(turned.affine))
    assert (wrong != array).any()


@pytest.mark.parametrize(
    ("codes", "words"),
    [((0, 0), "does not say which side is left"), ((1, 1), "sform and qform give the axes different")],
)
def test_a_header_that_leaves_the_sides_open_is_a_warning(single, arrays, codes, words):
    image = nib.Nifti1Pair(arrays["T2w"], np.diag([-1.0, 1, 1, 1]))
    image.set_qform(np.eye(4), codes[1])
    image.set_sform(np.diag([-1.0, 1, 1, 1]), codes[0])
    with pytest.warns(UserWarning, match=words):
        factorizer.segment(image, single)


@pytest.mark.parametrize(
    ("image", "options", "words"),
    [
        ("a.nii.gz", {}, "image: got str; it must be a NumPy array"),
        (np.ones(SHAPE), {}, "affine, spacing: give one of them"),
        (np.ones(SHAPE), {"affine": np.eye(4), "spacing": (1, 1, 1)}, "affine, spacing: give one of them"),
        (np.ones(SHAPE), {"spacing": (1, 1)}, r"spacing: got \(1, 1\); it must be finite numbers"),
        (np.ones(SHAPE), {"spacing": (1, 1, 0)}, "spacing: got .* above 0 mm"),
        (np.ones(SHAPE), {"spacing": (1, 1, 1000)}, "image: its voxels are 1 x 1 x 1000 mm large; they must"),
        (np.ones(SHAPE), {"affine": np.eye(3)}, r"affine: got .* of shape \(4, 4\)"),
        (np.ones(SHAPE), {"affine": "eye"}, "affine: got 'eye'"),
        (np.ones(SHAPE), {"affine": np.ones((4, 4))}, "affine: its last row is"),
        (np.ones(SHAPE), {"affine": np.diag([0, 1, 1, 1])}, "image: its affine is singular"),
        (np.ones(SHAPE, complex), {"spacing": (1, 1, 1)}, "image: its voxels are complex128"),
        (np.ones((4, 4)), {"spacing": (1, 1, 1)}, r"image: has shape \(4, 4\)"),
        (np.ones(SHAPE), {"spacing": (1, 1, 1)}, "image: holds a single value"),
        (np.full(SHAPE, np.nan), {"spacing": (1, 1, 1)}, "image: holds NaN or infinite"),
        (np.ones((*SHAPE, 2)), {"spacing": (1, 1, 1)}, r"image: 2 channels; .* 1 modalities \(MRI\)"),
        ([np.ones(SHAPE)] * 2, {"spacing": (1, 1, 1)}, "image: is a sequence of 2"),
        ({"CT": np.ones(SHAPE)}, {"spacing": (1, 1, 1)}, "image: has the modalities 'CT'; .* 'MRI'"),
        ({"MRI": 3}, {"spacing": (1, 1, 1)}, r"image\['MRI'\]: got int"),
        (nib.Nifti1Image(np.ones(SHAPE), np.eye(4)), {"spacing": (1, 1, 1)}, "spacing: is given, and image"),
        (nib.Nifti1Image(np.ones(SHAPE), None), {}, "image: is a nibabel image without an affine"),
        (nib.AnalyzeImage(np.ones(SHAPE, "f4"), np.eye(4)), {}, "image: is AnalyzeImage, which does not say"),
        (np.ones(SHAPE), {"spacing": (1, 1, 1), "resample": "CT"}, "resample: got 'CT'"),
        (np.ones(SHAPE), {"spacing": (1, 1, 1), "mirror": False}, "mirror: got False; the loaded model"),
        (np.ones(SHAPE), {"spacing": (1, 1, 1), "model": "absent"}, "model: got 'absent'; there are"),
        (np.ones(SHAPE), {"spacing": (1, 1, 1), "model": "absent.pt"}, "model: there is no absent.pt"),
        (np.ones(SHAPE), {"spacing": (1, 1, 1), "model": 3}, "model: got int"),
        (np.ones(SHAPE), {"spacing": (1, 1, 1), "model": __file__}, "model: .*: not a checkpoint"),
        (np.ones(SHAPE), {"model": "hippocampus", "num_iters": 1.5}, "num_iters: got 1.5; it must be a"),
        (np.ones(SHAPE), {"model": "hippocampus", "num_iters": -1}, "num_iters: got -1; it must be a"),
        (np.ones(SHAPE), {"model": "hippocampus", "num_iters": True}, "num_iters: got True; it must be a"),
        (np.ones(SHAPE), {"model": "hippocampus", "mirror": "x"}, "mirror: got 'x'; it must be True"),
        (np.ones(SHAPE), {"model": "hippocampus", "whole": "x"}, "whole: got 'x'; it must be True"),
        (np.ones(SHAPE), {"model": "hippocampus", "whole": None}, "whole: got None; it must be True"),
        (np.ones(SHAPE), {"model": "hippocampus", "device": "x"}, "device: 'x' is no device"),
        (np.ones(SHAPE), {"model": "hippocampus", "device": 1.5}, "device: 1.5 is no device"),
        (np.ones(SHAPE), {"probabilities": "x"}, "probabilities: got 'x'; it must be True"),
        (np.ones(SHAPE), {"resample": 3}, "resample: got 3; it must be a modality's name"),
    ],
)
def test_errors_name_the_argument(single, image, options, words):
    with pytest.raises(DataError, match=f"^{words}"):
        factorizer.segment(image, **{"model": load_predictor([single]), **options})


def test_networks_that_do_not_segment_the_same_are_the_models_fault(tumour, single, arrays):
    with pytest.raises(DataError, match=r"^model: checkpoint 2: modalities"):
        factorizer.segment(arrays["T2w"], [single, tumour], spacing=(1, 1, 1))


def test_without_the_extra_it_is_named(monkeypatch):
    real = builtins.__import__

    def hidden(name, *arguments):
        if name.split(".")[0] == "nibabel":
            raise ModuleNotFoundError("No module named 'nibabel'", name="nibabel")
        return real(name, *arguments)

    for name in [name for name in sys.modules if name.startswith("factorizer.segmentation.in_memory")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(vars(factorizer), "segment", raising=False)
    monkeypatch.setattr(builtins, "__import__", hidden)
    with pytest.raises(ModuleNotFoundError, match=r"needs nibabel: pip install 'factorizer-kernels\[seg\]'"):
        factorizer.segment  # noqa: B018
