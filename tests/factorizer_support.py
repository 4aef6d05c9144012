"""Helpers for the tests of `factorizer`: plans, networks, volumes, and the command line."""

import nibabel as nib
import numpy as np
import torch
from typer.testing import CliRunner

from factorizer.commands.cli import app
from factorizer.models.build import build_network
from factorizer.segmentation.cases import Case, Task
from factorizer.segmentation.plan import Plan, Wishes, plan_run
from factorizer.segmentation.survey import Geometry
from factorizer.segmentation.training import Trainer

SIZE = (16, 16, 16)
REGIONS = {"ET": (3,), "TC": (2, 3), "WT": (1, 2, 3)}
TUMOUR = {0: "background", 1: "edema", 2: "core", 3: "enhancing"}
MODALITIES = ("FLAIR", "T1w", "T1gd", "T2w")
ODD = np.array([[0, -1.5, 0, 5], [0, 0, -1, 6], [2, 0, 0, 7], [0, 0, 0, 1.0]])  # the affine of permuted axes


def plan_for(modalities=("A", "B"), labels=None, regions=None, network=None, **options):
    """A plan for a tiny network."""
    labels = labels or {0: "background", 1: "halo", 2: "core"}
    arguments = {
        "in_channels": len(modalities),
        "out_channels": len(regions or labels),
        "spatial_size": SIZE,
        "encoder_depth": (1, 1),
        "encoder_width": (8, 16),
        "strides": (1, 2),
        "decoder_depth": (1,),
        "norm": "LayerNorm",
        "reshape": ("SWMatricize", {"head_dim": 8, "patch_size": 4}),
        **(network or {}),
    }
    options = {"task": "task", "spacing": (1.0, 1.0, 1.0), "crop": SIZE, **options}
    return Plan(
        modalities=tuple(modalities), labels=labels, regions=regions or {}, network=arguments, **options
    )


def planned(shape=SIZE, spacing=(1.0, 1.0, 1.0), cases=10, labels=None, **options):
    """What `plan_run` plans for cases of one geometry, the last two of which are held out."""
    members = tuple(Case(f"case_{i}", ()) for i in range(cases))
    task = Task("task", ("A", "B"), labels or {0: "background", 3: "lesion"}, members)
    geometries = {case.name: Geometry(shape, spacing) for case in members}
    return plan_run(task, geometries, members[:-2], members[-2:], Wishes(**options))


def trainer_for(plan, **options):
    return Trainer(plan, build_network(plan.network, plan.seed), **options)


def checkpoint_for(plan, path):
    """Writes the checkpoint of an untrained network."""
    trainer_for(plan).save(path)
    return path


class Batches:
    """Batches that are a function of the step, and a trace of the steps asked for."""

    def __init__(self, plan):
        self.plan, self.asked = plan, []

    def case_names(self, step):
        return [f"case of step {step}"]

    def __getitem__(self, step):
        self.asked.append(step)
        generator = torch.Generator().manual_seed(step)
        image = torch.randn(2, len(self.plan.modalities), *self.plan.crop, generator=generator)
        return image, (image[:, :1] > 0.5).float()


def save_volume(path, shape=(4, 5, 6), affine=None, fill=1.0, varied=False):
    """Writes a volume of one value, or of `varied` ones, 1 mm apart; returns its path."""
    voxels = np.full(shape, fill, dtype=np.float32)
    if varied:
        voxels = np.random.default_rng(0).gamma(2, 100, shape).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return path


def four_modalities(folder, name, seed=0, shape=(15, 20, 17), affine=None):
    """One file for each modality, as name_0000.nii.gz and so on."""
    rng = np.random.default_rng(seed)
    affine = np.diag([1.0, 1, 1, 1]) if affine is None else affine
    folder.mkdir(parents=True, exist_ok=True)
    for channel in range(4):
        voxels = rng.gamma(2, 100, shape).astype(np.float32)
        nib.save(nib.Nifti1Image(voxels, affine), folder / f"{name}_{channel:04d}.nii.gz")


def run_command(*arguments, code=0):
    """Runs the command line; returns what it printed, on one line, as a terminal may break it anywhere."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    printed = " ".join((result.output + result.stderr).split())
    assert result.exit_code == code, (printed, result.exception)
    assert "Traceback" not in printed
    return printed


def write_series(folder, volume, **tags):
    """Writes a nibabel image of whole numbers as a DICOM series of MR, a file for each slice, with `tags`
    over those that it has; returns the folder."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-1.0, -1, 1, 1]) @ volume.affine
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    axes = affine[:3, :3] / sizes
    voxels = np.asarray(volume.dataobj)
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    for k in range(voxels.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        image = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        image.SOPClassUID, image.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
        image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = study, series, frame
        image.PatientName, image.PatientID, image.PatientBirthDate, image.PatientSex = "A^B", "1", "", ""
        image.StudyDate = image.StudyTime = image.AccessionNumber = image.ReferringPhysicianName = ""
        image.StudyID, image.SeriesNumber, image.InstanceNumber, image.Modality = "1", 3, k + 1, "MR"
        image.SeriesDescription, image.Manufacturer, image.PositionReferenceIndicator = "T1", "", ""
        image.Columns, image.Rows = voxels.shape[:2]
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 16, 16, 15, 1
        place = affine[:3, 3] + k * affine[:3, 2]
        image.ImagePositionPatient = [f"{x:.10g}" for x in place]
        image.ImageOrientationPatient = [f"{x:.10g}" for x in (*axes[:, 0], *axes[:, 1])]
        image.PixelSpacing = [f"{sizes[1]:.10g}", f"{sizes[0]:.10g}"]
        image.SliceThickness = f"{sizes[2]:.10g}"
        image.PixelData = np.ascontiguousarray(voxels[:, :, k].T, "<i2").tobytes()
        for name, value in tags.items():
            setattr(image, name, value)
        # Names in another order than the slices, and without an ending, as scanners and archives have them.
        pydicom.dcmwrite(folder / f"IM{(k * 7) % 1000:04d}", image, enforce_file_format=True)
    return folder
