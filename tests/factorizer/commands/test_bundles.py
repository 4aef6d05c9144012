"""The bundles: their metadata, their networks, and some steps of training, evaluation and inference.

MONAI downloads the metadata's schema unless a file of that name is there: here it is one with the same
required fields and types, so that the test needs no network.
"""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from factorizer_support import checkpoint_for, plan_for, run_command, save_volume
from monai.bundle import ConfigParser, run, verify_metadata, verify_net_in_out
from typer.testing import CliRunner

import factorizer
from factorizer.commands.cli import app
from factorizer.commands.demo import write_synthetic
from factorizer.segmentation.checkpoint import read_checkpoint
from factorizer.segmentation.recipe import RECIPE, Recipe

BUNDLES = Path(__file__).parents[3] / "bundles"
NAMES = sorted(path.name for path in BUNDLES.iterdir() if path.is_dir())
TINY = {
    "crop": [16, 16, 16],
    "network_arguments#encoder_depth": [1, 1],
    "network_arguments#encoder_width": [8, 16],
    "network_arguments#strides": [1, 2],
    "network_arguments#decoder_depth": [1],
    "network_arguments#num_deep_supr": 1,
}
TENSOR = {
    "type": "object",
    "properties": {
        "type": {"type": "string"},
        "format": {"type": "string"},
        "num_channels": {"type": "integer"},
        "spatial_shape": {"type": "array", "items": {"type": ["string", "integer"]}},
        "dtype": {"type": "string"},
        "value_range": {"type": "array", "items": {"type": "number"}},
        "is_patch_data": {"type": "boolean"},
        "channel_def": {"type": "object"},
    },
    "required": ["type", "format", "num_channels", "spatial_shape", "dtype", "value_range"],
}
TEXTS = ["schema", "version", "monai_version", "pytorch_version", "numpy_version"]
TEXTS += ["task", "description", "authors", "copyright"]
SCHEMA = {
    "type": "object",
    "properties": {
        **{name: {"type": "string"} for name in TEXTS},
        "required_packages_version": {"type": "object"},
        "references": {"type": "array", "items": {"type": "string"}},
        "network_data_format": {
            "type": "object",
            "properties": {
                side: {"type": "object", "additionalProperties": TENSOR} for side in ("inputs", "outputs")
            },
            "required": ["inputs", "outputs"],
        },
    },
    "required": [*TEXTS, "required_packages_version", "network_data_format"],
}


def configs(name, *files):
    return [str(BUNDLES / name / "configs" / f"{file}.json") for file in files]


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def data(name, tmp_path):
    """A tiny task with the bundle's modalities and labels: every voxel of a class is as bright as it."""
    (metadata,) = configs(name, "metadata")
    tensors = json.loads(Path(metadata).read_text())["network_data_format"]
    modalities = tensors["inputs"]["image"]["channel_def"]
    (labels,) = (json.loads(Path(file).read_text())["labels"] for file in configs(name, "train"))
    rng, training = np.random.default_rng(0), []
    for case in range(4):
        label = np.zeros((17, 18, 16), np.uint8)
        for depth, value in enumerate(map(int, list(labels)[1:])):
            label[4 + depth : 13 - depth, 5:12, 4:11] = value
        image = label[..., None] + rng.gamma(2, 0.3, (*label.shape, len(modalities)))
        for folder, volume in (("images", image.astype(np.float32)), ("labels", label)):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            file = nib.Nifti1Image(volume, np.diag([2.0, 2, 2, 1]))
            nib.save(file, tmp_path / "data" / folder / f"case_{case}.nii.gz")
        training.append({"image": f"images/case_{case}.nii.gz", "label": f"labels/case_{case}.nii.gz"})
    content = {"modality": modalities, "labels": labels, "training": training, "test": ["other.nii"]}
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(content))
    return tmp_path / "data"


def test_metadata(name, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    (metadata,) = configs(name, "metadata")
    verify_metadata(meta_file=metadata, filepath=str(schema))
    content = json.loads(Path(metadata).read_text())
    del content["task"]
    (tmp_path / "metadata.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="Failed validating"):
        verify_metadata(meta_file=str(tmp_path / "metadata.json"), filepath=str(schema))
    for file in ("LICENSE", "docs/README.md"):
        assert (BUNDLES / name / file).is_file()


def test_network_in_out(name):
    (metadata,) = configs(name, "metadata")
    options = {"meta_file": metadata, "config_file": configs(name, "inference"), "device": "cpu"}
    verify_net_in_out("network_def", **options)
    with pytest.raises(ValueError, match="channel number"):
        verify_net_in_out(
            "network_def", **options, **{"_meta_#network_data_format#outputs#pred#num_channels": 9}
        )


def test_networks_of_training_and_inference_are_the_same(name):
    train, inference = (json.loads(Path(file).read_text()) for file in configs(name, "train", "inference"))
    for key in ("crop", "network_arguments"):
        assert train[key] == inference[key]


def test_the_hippocampus_has_the_recipe_of_the_command_line():
    (train,) = configs("hippocampus_factorizer", "train")
    assert Recipe(**json.loads(Path(train).read_text())["recipe"]) == RECIPE


@pytest.mark.parametrize("name", ["brats_factorizer", "isles22_factorizer"])
def test_recipes_of_the_paper_are_what_their_pages_say(name):
    """What differs from `Recipe` stands in the file, and nothing else; intensities change with 0.15."""
    (train,) = configs(name, "train")
    given = json.loads(Path(train).read_text())["recipe"]
    assert all(given[field] != getattr(Recipe(), field) for field in given)
    recipe = Recipe(**given)
    probabilities = (recipe.noise_prob, recipe.blur_prob, recipe.scale_prob, recipe.shift_prob)
    assert {*probabilities, recipe.gamma_prob} == {0.15}


def test_train_evaluate_and_infer(name, data, tmp_path):
    folders = {"dataset_dir": str(data), "bundle_root": str(tmp_path), "device": "cpu"}
    options = {**TINY, **folders, "steps": 2, "val_interval": 2, "workers": 0}
    run(config_file=configs(name, "train"), spacing=[2.0, 2.0, 2.0], **options)
    checkpoint = tmp_path / "models" / "checkpoint.pt"
    plan, state = read_checkpoint(checkpoint)
    assert len(state["losses"]) == 2
    assert (tmp_path / "models" / "best.pt").is_file()
    (train,) = (json.loads(Path(file).read_text()) for file in configs(name, "train"))
    assert plan.regions == {region: tuple(v) for region, v in train["regions"].items()}

    run(config_file=configs(name, "train", "evaluate"), spacing=[2.0, 2.0, 2.0], **options)
    lines = (tmp_path / "predictions" / "scores.csv").read_text().splitlines()
    assert len(lines) == 1 + len(plan.held_out) * len(plan.targets)
    # Of another network: its scores must not be those of the predictions that are there.
    changed = {**options, "network_arguments#num_iters": 1}
    with pytest.raises(RuntimeError) as error:
        run(config_file=configs(name, "train", "evaluate"), spacing=[2.0, 2.0, 2.0], **changed)
    assert "made with other settings (num_iters)" in str(error.value.__cause__)

    inference = {**TINY, **folders, "section": "training", "output_dir": str(tmp_path / "all")}
    run(config_file=configs(name, "inference"), **inference)
    labels = [nib.load(tmp_path / "all" / f"case_{case}.nii.gz") for case in range(4)]
    assert all(label.shape == (17, 18, 16) for label in labels)
    assert all(set(np.unique(label.dataobj)) <= set(plan.labels) for label in labels)
    (again,) = plan.held_out
    before = (tmp_path / "predictions" / f"{again}.nii.gz").read_bytes()
    assert (tmp_path / "all" / f"{again}.nii.gz").read_bytes() == before


def test_inference_refuses_the_weights_of_another_network(tmp_path):
    """Whose shapes are the same: windows without their shifted copies have the same weights."""
    bundle = "hippocampus_factorizer"
    (arguments,) = (
        json.loads(Path(f).read_text())["network_arguments"] for f in configs(bundle, "inference")
    )
    arguments |= {"spatial_size": (36, 52, 36), "reshape": ("Matricize", {"head_dim": 8, "patch_size": 4})}
    plan = plan_for(("MRI",), network=arguments, crop=(36, 52, 36))
    (tmp_path / "models").mkdir()
    checkpoint_for(plan, tmp_path / "models" / "checkpoint.pt")
    save_volume(tmp_path / "in.nii.gz", (36, 52, 36))
    options = {"bundle_root": str(tmp_path), "input": str(tmp_path / "in.nii.gz"), "device": "cpu"}
    with pytest.raises(RuntimeError) as error:
        run(config_file=configs(bundle, "inference"), **options)
    assert "has a network with reshape" in str(error.value.__cause__)


def test_inference_keeps_results_from_the_inputs(name, tmp_path):
    save_volume(tmp_path / "in.nii.gz", (36, 52, 36))
    options = {"bundle_root": str(tmp_path), "input": str(tmp_path / "in.nii.gz"), "device": "cpu"}
    with pytest.raises(RuntimeError) as error:
        run(config_file=configs(name, "inference"), **options, output_dir=str(tmp_path))
    assert f"output_dir: {tmp_path} holds the inputs" in str(error.value.__cause__)


def test_inference_takes_the_weights_of_the_package(tmp_path):
    """Where nobody has trained, run as `factorizer predict` runs them, as the bundle's README says."""
    rng = np.random.default_rng(0)
    volume = nib.Nifti1Image(rng.gamma(2, 100, (36, 52, 36)).astype(np.float32), np.eye(4))
    nib.save(volume, tmp_path / "in.nii.gz")
    options = {"bundle_root": str(tmp_path), "input": str(tmp_path / "in.nii.gz"), "device": "cpu"}
    run(config_file=configs("hippocampus_factorizer", "inference"), **options)
    labels = np.asarray(nib.load(tmp_path / "predictions" / "in.nii.gz").dataobj)
    expected = factorizer.segment(volume, "hippocampus")
    np.testing.assert_array_equal(labels, np.asarray(expected.dataobj))
    settings = [tmp_path / folder / "settings.json" for folder in ("predictions", "command")]
    inputs = ["--input", tmp_path / "in.nii.gz", "--device", "cpu"]
    run_command("predict", "--model", "hippocampus", *inputs, "--output", tmp_path / "command")
    assert settings[0].read_text() == settings[1].read_text()
    assert json.loads(settings[0].read_text())["mirror"]
    files = configs("hippocampus_factorizer", "inference")
    run(config_file=files, **options, mirror=False, output_dir=str(tmp_path / "plain"))
    assert not json.loads((tmp_path / "plain" / "settings.json").read_text())["mirror"]


def test_files_for_training_work_with_inference(name, tmp_path):
    """Whatever part of the training's configuration they change: inference has all of its names."""
    (tmp_path / "more.json").write_text(
        json.dumps(
            {
                **TINY,
                "weight_decay": 0.5,
                "recipe#noise_std": 0.2,
                "plan#task": "mine",
                "split#seed": 3,
                "train#trainer#workers": 1,
                "validate#metric#device": "cpu",
                "task#root": ".",
            }
        )
    )
    for files in (("train",), ("inference",)):
        parser = ConfigParser()
        parser.read_config([*configs(name, *files), str(tmp_path / "more.json")])
        network = parser.get_parsed_content("network_def")
        assert sum(p.numel() for p in network.parameters()) < 100_000


def test_brain_tumours_as_brats_numbers_them(tmp_path):
    """Labels 1, 2, 4, the modalities in another order, a folder for each patient."""
    names, entries, rng = ("t1", "t1ce", "t2", "flair"), [], np.random.default_rng(0)
    for case in range(4):
        folder = tmp_path / "data" / f"patient_{case}"
        folder.mkdir(parents=True)
        label = np.zeros((17, 18, 16), np.uint8)
        for depth, value in enumerate((2, 1, 4)):
            label[4 + depth : 13 - depth, 5:12, 4:11] = value
        for file in names:
            image = (label + rng.gamma(2, 0.3, label.shape)).astype(np.float32)
            nib.save(nib.Nifti1Image(image, np.eye(4)), folder / f"{file}.nii.gz")
        nib.save(nib.Nifti1Image(label, np.eye(4)), folder / "seg.nii.gz")
        images = [f"patient_{case}/{file}.nii.gz" for file in names]
        entries.append({"image": images, "label": f"patient_{case}/seg.nii.gz"})
    content = {
        "modality": dict(zip("0123", ("T1", "T1ce", "T2", "FLAIR"), strict=True)),
        "labels": {"0": "background", "1": "NCR/NET", "2": "ED", "4": "ET"},
        "training": entries,
    }
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(content))
    bundle = shutil.copytree(BUNDLES / "brats_factorizer", tmp_path / "bundle")
    (bundle / "configs" / "tiny.json").write_text(json.dumps(TINY))
    run_command(
        *("train", tmp_path / "data", "--out", tmp_path / "run", "--bundle", bundle, "--config", "tiny"),
        *("--steps", 1, "--workers", 0, "--device", "cpu", "--flips", "none", "--learning-rate", "1e-3"),
    )
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["regions"] == {"ET": [4], "TC": [1, 4], "WT": [1, 2, 4]}
    assert plan["modalities"] == ["T1", "T1ce", "T2", "FLAIR"]
    assert (plan["flips"], plan["learning_rate"]) == ([], 1e-3)
    assert plan["held_out"][0].startswith("patient_")


def test_the_command_line_follows_a_bundle(tmp_path):
    """With a network that is made tiny by a further file of the bundle."""
    bundle = shutil.copytree(BUNDLES / "hippocampus_factorizer", tmp_path / "bundle")
    (bundle / "configs" / "tiny.json").write_text(json.dumps(TINY))
    data = write_synthetic(tmp_path / "data", cases=3, shape=(18, 18, 18))
    options = ["train", data, "--out", tmp_path / "run", "--bundle", bundle, "--config", "tiny"]
    options += ["--steps", 2, "--validate-every", 1, "--device", "cpu", "--seed", 3]
    result = CliRunner().invoke(app, list(map(str, options)))
    assert result.exit_code == 2, result.output
    assert "the bundle needs ('MRI',)" in result.stderr
    content = json.loads((data / "dataset.json").read_text()) | {"modality": {"0": "MRI"}}
    for case in content["training"]:
        image = nib.load(data / case["image"])
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[..., 0], image.affine), data / case["image"])
    (data / "dataset.json").write_text(json.dumps(content))
    wrong = [*options[:-4], "--device", "cpu", "--seed", 3, "--validate-every", 0]
    result = CliRunner().invoke(app, list(map(str, wrong)))
    assert result.exit_code == 2, result.output
    assert "validate-every: got 0" in result.stderr
    for _ in range(2):  # the second time it is finished
        result = CliRunner().invoke(app, list(map(str, options)))
        assert result.exit_code == 0, (result.output, result.exception)
    plan, state = read_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert (len(state["losses"]), plan.seed, plan.crop) == (2, 3, (16, 16, 16))
    assert [step for step, _ in state["scores"]] == [1, 2]


@pytest.mark.parametrize("name", ["brats_factorizer"])  # which prepares volumes at their first use
def test_the_command_line_checks_every_file_before_a_bundle_trains(name, data, tmp_path):
    (data / "images" / "case_2.nii.gz").write_bytes(b"")
    options = ["train", data, "--out", tmp_path / "run", "--bundle", BUNDLES / name, "--device", "cpu"]
    result = CliRunner().invoke(app, list(map(str, options)))
    assert result.exit_code == 2, result.output
    assert "case_2.nii.gz: not readable" in " ".join(result.stderr.split())
    assert not list((tmp_path / "run").iterdir())


def test_four_shifts_are_the_later_recipe():
    parser = ConfigParser()
    parser.read_config(configs("brats_factorizer", "train", "four_shifts"))
    network = parser.get_parsed_content("network_def")
    one_head = 7_603_459  # parameters of the published network, which has one head of 32 -> 3 channels
    more_heads = sum(width * 3 + 3 for width in (64, 128))
    assert sum(p.numel() for p in network.parameters()) == one_head + more_heads
    assert parser.get_parsed_content("weight_decay") == 1e-5


def test_networks_are_those_of_the_paper():
    published = {"brats_factorizer": (5_855_619, 3), "isles22_factorizer": (7_372_289, 1)}  # with one head
    for name, (parameters, outputs) in published.items():
        parser = ConfigParser()
        parser.read_config(configs(name, "train"))
        network = parser.get_parsed_content("network_def")
        more_heads = sum((width + 1) * outputs for width in (64, 128))
        assert sum(p.numel() for p in network.parameters()) == parameters + more_heads
