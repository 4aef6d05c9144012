"""Segmenting on an image's own grid, and loading a network again."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from factorizer_support import REGIONS, TUMOUR, plan_for
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from factorizer.models.build import build_network
from factorizer.segmentation.cases import Case, Task
from factorizer.segmentation.checkpoint import load_network
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.files import load_tensors
from factorizer.segmentation.inference import Predictor, keep_largest
from factorizer.segmentation.plan import Wishes, plan_run
from factorizer.segmentation.processes import pick_device
from factorizer.segmentation.survey import Geometry
from factorizer.segmentation.training import Trainer
from factorizer.segmentation.transforms import PreparedCase
from factorizer.segmentation.volumes import write_volume
from factorizer_kernels import use_backend

AFFINES = {
    "as the network sees it": np.diag([1.0, 1, 1, 1]),
    "left, posterior, superior": np.diag([-1.0, -1, 1, 1]),
    "axes permuted": np.array([[0, -1, 0, 5], [0, 0, -1, 6], [1, 0, 0, 7], [0, 0, 0, 1.0]]),
}


@pytest.fixture
def plan():
    members = tuple(Case(str(i), ()) for i in range(3))
    task = Task("task", ("A",), {0: "background", 4: "a", 7: "b"}, members)
    geometries = {case.name: Geometry((16, 16, 16), (1.0, 1.0, 1.0)) for case in members}
    return plan_run(task, geometries, members[:2], members[2:], Wishes(steps=1))


class OnSmallGPU(Predictor):
    """A predictor on a GPU, played by the CPU, that has room for so many windows at a time."""

    def __init__(self, models, room, **options):
        super().__init__(models, **options)
        self.device, self.windows, self.room, self.told = torch.device("cuda"), 2, room, []
        self.tell = self.told.append

    def _forward(self, network, x, device):
        if device.type == "cuda" and len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super()._forward(network, x, torch.device("cpu"))


class Thresholds(nn.Module):
    """Class 1 where the z-score is above 0, class 2 where it is above 1."""

    def forward(self, x):
        return torch.cat([-x, x * 0 + x.clamp(max=1), 2 * x - 1], dim=1)


class Traveller(Thresholds):
    """Remembers where it was sent."""

    def __init__(self):
        super().__init__()
        self.journey = []

    def to(self, device):
        self.journey.append(str(device))
        return self


def thresholds(image):
    scores = (image - image[image != 0].mean()) / image[image != 0].std()
    return np.select([image == 0, scores > 1, scores > 0], [0, 7, 4], 0)


@pytest.mark.parametrize("name", AFFINES)
def test_segmentation_lies_on_the_images_grid(plan, tmp_path, name):
    # Larger than the crop along two axes, smaller along one: windows are moved and padded.
    # Air on two sides is cut off before, and background afterwards.
    image = np.random.default_rng(0).gamma(2, 100, (30, 12, 21)).astype(np.float32)
    image[:3], image[:, :, -2:] = 0, 0
    nib.save(nib.Nifti1Image(image, AFFINES[name]), tmp_path / "image.nii.gz")
    labels = Predictor([(Thresholds(), plan)]).segment(Case("case", (tmp_path / "image.nii.gz",)))
    assert labels.dtype == np.uint8
    # Rounding decides where a score is within it of a threshold: in none of these voxels.
    np.testing.assert_array_equal(labels, thresholds(image))


def test_segmentation_on_a_coarser_grid(plan, tmp_path):
    # A large ball, 2 mm apart where the network wants 1 mm: only its surface can move.
    place = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in (16, 18, 20)], indexing="ij"))
    radius = np.sqrt((place**2).sum(0))
    image = np.where(radius < 0.6, 300, 100).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.diag([-2.0, 2, 2, 1])), tmp_path / "image.nii.gz")
    labels = Predictor([(Thresholds(), plan)]).segment(Case("case", (tmp_path / "image.nii.gz",)))
    assert labels.shape == image.shape
    assert (labels[radius < 0.5] > 0).all()
    assert (labels[radius > 0.75] == 0).all()


def test_written_segmentation_has_the_images_header(tmp_path):
    affine = np.array([[0.9, 0.1, 0, -20], [-0.1, 0.9, 0, 30], [0, 0, 2, 5], [0, 0, 0, 1]])
    image = nib.Nifti1Image(np.zeros((5, 6, 7), dtype=np.float32), affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=2)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, tmp_path / "image.nii.gz")
    labels = np.random.default_rng(0).integers(0, 3, (5, 6, 7), dtype=np.uint8)
    write_volume(labels, tmp_path / "image.nii.gz", tmp_path / "labels.nii.gz")
    image, written = nib.load(tmp_path / "image.nii.gz"), nib.load(tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(written.affine, image.affine)
    np.testing.assert_array_equal(np.asarray(written.dataobj), labels)
    assert written.get_data_dtype() == np.uint8
    for field in ("qform_code", "sform_code", "xyzt_units"):
        assert written.header[field] == image.header[field]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("spacing", "times"), [((1.0, 1.0, 1.0), 1), ((2.0, 1.0, 1.0), 2)])
def test_an_ensemble_prepares_a_case_once_for_plans_that_agree(plan, tmp_path, monkeypatch, spacing, times):
    image = np.random.default_rng(0).gamma(2, 100, (20, 16, 18)).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / "image.nii.gz")
    case = Case("case", (tmp_path / "image.nii.gz",))
    models = [(Thresholds(), plan), (Thresholds(), replace(plan, spacing=spacing, seed=1))]
    expected = sum(Predictor([model]).logits(case) for model in models) / 2
    prepared = []

    class Counted(PreparedCase):
        def __init__(self, *arguments):
            prepared.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr("factorizer.segmentation.inference.PreparedCase", Counted)
    torch.testing.assert_close(Predictor(models).logits(case), expected, rtol=1e-5, atol=1e-5)
    assert len(prepared) == times


def test_an_ensemble_of_two_spacings_on_a_tilted_image_is_the_mean_of_its_members(
    plan, tmp_path, monkeypatch
):
    # Of thick slices that are tilted backwards, which axis a slab is cut along depends on the spacing.
    image = np.random.default_rng(0).gamma(2, 100, (20, 24, 10)).astype(np.float32)
    tilt = np.radians(-25)
    affine = np.diag([0.8, 0.8, 5, 1])
    affine[1, 2], affine[2, 2] = 5 * np.sin(tilt), 5 * np.cos(tilt)
    nib.save(nib.Nifti1Image(image, affine), tmp_path / "image.nii.gz")
    case = Case("case", (tmp_path / "image.nii.gz",))
    models = [(Thresholds(), plan), (Thresholds(), replace(plan, spacing=(1.0, 1.0, 4.0), crop=(16, 16, 8)))]
    monkeypatch.setattr("factorizer.segmentation.inference.SLAB_ELEMENTS", 2**12)  # several slabs
    expected = sum(Predictor([model]).logits(case) for model in models) / 2
    for members in (models, models[::-1]):
        torch.testing.assert_close(Predictor(members).logits(case), expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_is_read_once(plan, tmp_path, monkeypatch):
    Trainer(plan, build_network(plan.network, plan.seed)).save(tmp_path / "checkpoint.pt")
    read, load = [], load_tensors
    monkeypatch.setattr(
        "factorizer.segmentation.checkpoint.load_tensors", lambda path: read.append(path) or load(path)
    )
    load_network(tmp_path / "checkpoint.pt")
    assert read == [tmp_path / "checkpoint.pt"]


def test_a_checkpoint_gives_identical_logits(plan, tmp_path):
    trainer = Trainer(plan, build_network(plan.network, plan.seed))

    class Batches:
        def __getitem__(self, step):
            return torch.randn(2, 1, *plan.crop), torch.zeros(2, 1, *plan.crop)

    trainer.run(Batches(), tmp_path / "checkpoint.pt", lambda step: None)
    network, loaded = load_network(tmp_path / "checkpoint.pt")
    assert loaded == plan
    assert not network.training
    image = torch.randn(1, 1, *plan.crop)
    with torch.no_grad():
        assert all(map(torch.equal, network(image), trainer.result.eval()(image)))


def test_load_network_needs_no_seed_in_common(plan, tmp_path):
    # Buffers such as the initial factors come from the file, not from the seed.
    trainer = Trainer(replace(plan, seed=5), build_network(plan.network, 3))
    trainer.losses = [0.0]
    trainer.save(tmp_path / "checkpoint.pt")
    network, _ = load_network(tmp_path / "checkpoint.pt")
    for name, value in trainer.network.state_dict().items():
        assert torch.equal(network.state_dict()[name], value)


def test_keep_largest():
    labels = np.zeros((6, 5, 4), np.uint8)
    labels[:2, :2, :2] = 1  # eight voxels
    labels[2, 2, 2] = 1  # a ninth, by its corner
    labels[4:, 4, 3] = 1  # two apart
    labels[5, 0, 0] = 2
    plan = plan_for()
    found = keep_largest(labels, plan, ["halo", "core"])
    want = labels.copy()
    want[4:, 4, 3] = 0
    np.testing.assert_array_equal(found, want)
    assert labels[4, 4, 3] == 1  # what was given is left alone
    np.testing.assert_array_equal(keep_largest(np.zeros_like(labels), plan, ["halo"]), 0 * labels)
    np.testing.assert_array_equal(keep_largest(labels, plan, []), labels)


def test_keep_largest_of_regions():
    plan = plan_for(labels=TUMOUR, regions=REGIONS)
    labels = np.zeros((12, 6, 6), np.uint8)
    labels[:8] = 1  # the whole tumour, one piece
    labels[1:4, 1:4, 1:4] = 2
    labels[2, 2, 2] = 3
    labels[6, 4, 4] = 3  # apart from the rest of the core
    labels[3, 3, 3] = 3  # touches the other by a corner
    labels[10:, 0, 0] = 3  # apart from the whole tumour
    found = keep_largest(labels, plan, list(REGIONS))
    want = labels.copy()
    want[10:, 0, 0] = 0
    want[6, 4, 4] = 1  # oedema, as around it, and no hole
    np.testing.assert_array_equal(found, want)
    labels[10:, 0, 0] = 0
    alone = keep_largest(labels, plan, ["ET"])
    assert alone[6, 4, 4] == 2  # the core, of which it is a part, is not cut
    assert (alone == 3).sum() == 2


@pytest.mark.parametrize(
    ("room", "whole", "journey", "words"),
    [
        (2, False, [], []),
        (1, False, [], ["two windows at a time: one by one from here on"]),
        (
            0,
            False,
            ["cpu", "cuda"] * 2,
            [
                "two windows at a time",
                "a volume: it goes through the CPU",
                "a volume: it goes through the CPU",
            ],
        ),
        (0, True, ["cpu", "cuda"] * 2, ["a volume: it goes through the CPU"] * 2),
    ],
)
def test_a_gpu_that_is_too_small(plan, tmp_path, room, whole, journey, words):
    image = np.random.default_rng(0).gamma(2, 100, (20, 12, 21)).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / "image.nii.gz")
    network = Traveller()
    predictor = OnSmallGPU([(network, plan)], room, whole=whole)
    network.journey.clear()
    for _ in range(2):
        labels = predictor.segment(Case("case", (tmp_path / "image.nii.gz",)))
        np.testing.assert_array_equal(labels, thresholds(image))
    assert network.journey == journey
    assert len(predictor.told) == len(words)
    assert all(word in told for word, told in zip(words, predictor.told, strict=True))


def test_networks_whose_outputs_are_in_another_order_are_refused():
    models = [(Thresholds(), plan_for(labels=TUMOUR, regions=REGIONS))]
    turned = plan_for(labels=TUMOUR, regions=dict(reversed(REGIONS.items())))
    with pytest.raises(DataError, match=r"checkpoint 2: regions = .* in another order"):
        Predictor([*models, (Thresholds(), turned)])
    assert Predictor(models * 2).plan.outputs == list(REGIONS)


def test_a_cpu_that_is_too_small_is_an_error(plan, tmp_path):
    image = np.random.default_rng(0).gamma(2, 100, (20, 12, 21)).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / "image.nii.gz")

    class Greedy(Thresholds):
        def forward(self, x):
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        Predictor([(Greedy(), plan)]).segment(Case("case", (tmp_path / "image.nii.gz",)))


def test_the_reference_asks_for_what_an_apple_gpu_has():
    """A network on the reference, as devices without kernels run it, takes torch's own operators alone, and
    none in float64, which there is not on such a GPU."""
    plan = plan_for(("MRI",))
    network = build_network(plan.network, 0).eval()
    asked = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            asked.add(func.namespace)
            y = func(*args, **(kwargs or {}))
            assert all(t.dtype != torch.float64 for t in tree_leaves(y) if isinstance(t, torch.Tensor)), func
            return y

    with torch.no_grad(), use_backend("reference"), Watch():
        logits = network(torch.rand(2, 1, *plan.crop))
    assert logits.shape == (2, 3, *plan.crop)
    assert asked == {"aten"}
    with pytest.raises(DataError, match="device: 'mps' is not here: torch sees no Apple GPU"):
        pick_device("mps")
