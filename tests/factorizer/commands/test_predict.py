"""factorizer predict: label maps, cases and checkpoints that cannot be used."""

import csv
import errno
import json
import os
import re
import shutil
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from factorizer_support import (
    MODALITIES,
    ODD,
    REGIONS,
    TUMOUR,
    checkpoint_for,
    four_modalities,
    plan_for,
    run_command,
    save_volume,
)
from matplotlib.image import imread


def test_predict_four_modalities_of_any_orientation(tumour, tmp_path):
    four_modalities(tmp_path / "in", "straight")
    four_modalities(tmp_path / "in", "odd", affine=ODD)
    run_command("predict", "--checkpoint", tumour, "--input", tmp_path / "in", "--output", tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"straight.nii.gz", "odd.nii.gz", "settings.json", "made_from", "report.json"}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(case["name"], case["result"], len(case["inputs"])) for case in report["cases"]] == [
        ("odd", "done", 4),
        ("straight", "done", 4),
    ]
    assert report["versions"]["torch"]
    assert report["device"] == "cpu"
    for name, affine in (("straight", np.eye(4)), ("odd", ODD)):
        labels = nib.load(tmp_path / "out" / f"{name}.nii.gz")
        assert labels.shape == (15, 20, 17)
        np.testing.assert_allclose(labels.affine, affine)
        assert labels.get_data_dtype() == np.uint8
        assert set(np.unique(labels.dataobj)) <= set(TUMOUR)


def test_cases_that_fail_are_named_and_the_others_go_on(tumour, tmp_path):
    four_modalities(tmp_path / "in", "good")
    four_modalities(tmp_path / "in", "three")
    (tmp_path / "in" / "three_0003.nii.gz").unlink()
    four_modalities(tmp_path / "in", "corrupt")
    (tmp_path / "in" / "corrupt_0002.nii.gz").write_bytes(b"not an image")
    four_modalities(tmp_path / "in", "apart")
    nib.save(
        nib.Nifti1Image(np.ones((15, 20, 17), np.float32), 2 * np.eye(4)),
        tmp_path / "in" / "apart_0001.nii.gz",
    )
    options = ["--checkpoint", tumour, "--output", tmp_path / "out"]
    inputs = ["--input", tmp_path / "in", "--input", tmp_path / "absent.nii.gz"]
    printed = run_command("predict", *options, *inputs, code=1)
    assert re.search(r"three: failed: .*3 channels; there must be one for each of the 4", printed)
    assert re.search(r"corrupt: failed: .*corrupt_0002.nii.gz: not readable as NIfTI", printed)
    assert re.search(r"apart: failed: .*apart_0001.nii.gz: lies on another grid", printed)
    assert re.search(r"absent: failed: .*absent.nii.gz: there is no such file", printed)
    assert "1 segmented" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("good.nii.gz", "settings.json", "made_from", "report.json"),
    }
    before = (tmp_path / "out" / "good.nii.gz").stat().st_mtime_ns
    printed = run_command("predict", *options, *inputs, code=1)
    assert "0 segmented, 1 were there, 4 failed" in printed
    assert (tmp_path / "out" / "good.nii.gz").stat().st_mtime_ns == before
    printed = run_command("predict", *options, *inputs, "--num-iters", 1, code=2)
    assert "made with other settings (num_iters)" in printed


def test_modalities_on_one_grid_but_for_rounding(tumour, tmp_path):
    four_modalities(tmp_path / "in", "a [b]", affine=ODD)
    path = tmp_path / "in" / "a [b]_0002.nii.gz"
    image = nib.load(path)
    near = ODD.copy()
    near[:3, 3] += 2e-3
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), near), path)
    options = ["--checkpoint", tumour, "--input", tmp_path / "in", "--output"]
    run_command("predict", *options, tmp_path / "out")
    np.testing.assert_array_equal(nib.load(tmp_path / "out" / "a [b].nii.gz").affine, ODD.astype(np.float32))
    path.write_bytes(b"")
    assert "a [b]: failed:" in run_command(
        "predict", *options, tmp_path / "again", code=1
    )  # brackets are no markup


def test_a_full_disk_leaves_nothing_half_written(tumour, tmp_path, monkeypatch):
    four_modalities(tmp_path / "in", "case")

    def full(image, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("factorizer.segmentation.volumes.nib.save", full)
    options = ["--checkpoint", tumour, "--input", tmp_path / "in", "--output", tmp_path / "out"]
    assert re.search(r"No space left on device: '.*case.nii.gz'", run_command("predict", *options, code=1))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "settings.json",
        "made_from",
        "report.json",
    }
    assert not list((tmp_path / "out" / "made_from").iterdir())


def test_no_input_gets_the_result_of_another(tumour, tmp_path):
    """A result counts only where it was made from these very inputs, and is what was made."""
    for name, seed in (("a", 1), ("b", 2)):
        four_modalities(tmp_path / name, "scan", seed=seed)
    out, again = tmp_path / "out", "0 segmented, 1 were there, 0 failed"

    def predict(inputs, *options, code=0):
        return run_command(
            *("predict", "--checkpoint", tumour, "--input", inputs, "--output", out), *options, code=code
        )

    predict(tmp_path / "a")
    first = (out / "scan.nii.gz").read_bytes()
    assert again in predict(tmp_path / "a")
    assert "made from other inputs" in predict(tmp_path / "b", code=1)
    assert (out / "scan.nii.gz").read_bytes() == first
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    assert again in predict(tmp_path / "moved")  # the content counts, wherever it lies

    path = tmp_path / "a" / "scan_0002.nii.gz"
    times = path.stat()
    path.write_bytes((tmp_path / "b" / "scan_0002.nii.gz").read_bytes())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "made from other inputs" in predict(tmp_path / "a", code=1)
    assert "1 segmented" in predict(tmp_path / "a", "--overwrite")
    assert again in predict(tmp_path / "a")

    files = [tmp_path / "a" / f"scan_000{k}.nii.gz" for k in range(4)]
    swapped = ",".join(str(files[k]) for k in (1, 0, 2, 3))
    assert "their numbers must be _0000, _0001" in predict(swapped, code=2)
    for k, name in enumerate(("t1ce", "t1", "flair", "t2")):
        files[k] = files[k].rename(tmp_path / "a" / f"scan_{name}.nii.gz")
    printed = predict(",".join(map(str, files)), "--overwrite", code=1)
    assert "scan_t1ce.nii.gz: is given as FLAIR, and by its name is T1gd" in printed

    save_volume(out / "scan.nii.gz", (15, 20, 17))
    assert "was changed since it was made" in predict(tmp_path / "moved", code=1)
    (out / "made_from" / "scan.json").unlink()
    assert "nothing says what it was made from" in predict(tmp_path / "moved", code=1)
    assert "made with other settings (whole)" in predict(tmp_path / "moved", "--whole", code=2)
    assert "1 segmented" in predict(tmp_path / "moved", "--whole", "--overwrite")
    assert "1 segmented" in predict(tmp_path / "moved", "--overwrite")


def test_checkpoints_that_cannot_be_used(tumour, tmp_path):
    four_modalities(tmp_path / "in", "case")
    options = ["--input", tmp_path / "in", "--output", tmp_path / "out", "--checkpoint"]
    assert "there is no" in run_command("predict", *options, tmp_path / "absent.pt", code=2)
    (tmp_path / "text.pt").write_text("no tensors")
    assert "text.pt: not a checkpoint" in run_command("predict", *options, tmp_path / "text.pt", code=2)
    other = checkpoint_for(plan_for(MODALITIES), tmp_path / "other.pt")
    printed = run_command("predict", *options, tumour, "--checkpoint", other, code=2)
    assert "checkpoint 2: labels = " in printed
    state = torch.load(tumour, weights_only=True)
    state["network"] = torch.load(other, weights_only=True)["network"]
    torch.save(state, tmp_path / "mixed.pt")
    assert "its weights do not fit the network" in run_command(
        "predict", *options, tmp_path / "mixed.pt", code=2
    )
    for content in ({"members": 3}, {"members": [3]}, {"members": []}):
        torch.save(content, tmp_path / "members.pt")
        for command in ("predict", "explain"):
            printed = run_command(command, *options, tmp_path / "members.pt", code=2)
            assert "members.pt: not a model file: its members are" in printed
    for content in ({"plan": {"a": 1}, "network": {}}, {"plan": 3, "network": 1}, {"state_dict": {}}):
        torch.save(content, tmp_path / "alien.pt")
        assert "alien.pt: not a checkpoint of this program" in run_command(
            "predict", *options, tmp_path / "alien.pt", code=2
        )
    state["plan"]["network"] = {**state["plan"]["network"], "solver": "newton"}
    torch.save(state, tmp_path / "solver.pt")
    assert "its plan describes no network" in run_command("predict", *options, tmp_path / "solver.pt", code=2)
    assert not (tmp_path / "out").exists()


def test_inputs_that_cannot_be_used(tumour, tmp_path):
    options = ["predict", "--checkpoint", tumour, "--output", tmp_path / "out", "--input"]
    (tmp_path / "empty").mkdir()
    assert "no cases" in run_command(*options, tmp_path / "empty", code=2)
    assert "typo does not exist, and is no NIfTI file" in run_command(*options, tmp_path / "typo", code=2)
    four_modalities(tmp_path / "out", "case")
    assert "out holds the inputs" in run_command(*options, tmp_path / "out", code=2)
    (tmp_path / "list.json").write_text("{}")
    assert "list.json: needs one of the lists" in run_command(*options, tmp_path / "list.json", code=2)


def test_predict_draws_and_measures(tumour, tmp_path):
    four_modalities(tmp_path / "in", "a", affine=ODD)
    out = tmp_path / "out"
    options = ["predict", "--checkpoint", tumour, "--input", tmp_path / "in", "--output", out]
    run_command(*options, "--preview", "--statistics")
    assert imread(out / "previews" / "a.png")[..., :3].std() > 0.03
    voxels = np.asarray(nib.load(out / "a.nii.gz").dataobj)
    with (out / "statistics.csv").open() as file:
        rows = {row["target"]: row for row in csv.DictReader(file)}
    assert int(rows["WT"]["voxels"]) == (voxels > 0).sum()
    assert float(rows["WT"]["ml"]) == pytest.approx((voxels > 0).sum() * 3e-3)
    (out / "previews" / "a.png").unlink()
    assert "1 were there" in run_command(*options, "--preview")  # drawn, though not made anew
    assert (out / "previews" / "a.png").exists()
    assert (out / "statistics.csv").exists()
    run_command(*options, "--overwrite", "--no-mirror")
    assert not (out / "statistics.csv").exists()  # it is another result's
    assert not (out / "previews" / "a.png").exists()  # it may be another result's


@pytest.mark.parametrize("also", [[], ["--also", "nrrd"]])
def test_predict_leaves_what_it_did_not_make(tumour, tmp_path, also):
    sitk = pytest.importorskip("SimpleITK")
    four_modalities(tmp_path / "in", "a")
    out = tmp_path / "out"
    bystanders = {}
    for name in ("nrrd/a.nrrd", "mha/a.mha", "probabilities/a.npz", "previews/a.png", "statistics.csv"):
        file = out / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"of another program")
        bystanders[file] = file.read_bytes()
    options = ["predict", "--checkpoint", tumour, "--input", tmp_path / "in", "--output", out]
    printed = run_command(*options, *also, code=1 if also else 0)
    assert not also or "a.nrrd: is there, and nothing says what it was made from" in printed
    assert {file: file.read_bytes() for file in bystanders} == bystanders
    if not also:
        printed = run_command(*options, "--preview", code=1)
        assert "a.png is there, and is no picture of predict" in printed
        assert "statistics.csv is there, and is no file" in run_command(*options, "--statistics", code=2)
        assert {file: file.read_bytes() for file in bystanders} == bystanders
        (out / "report.json").write_text("{}")
        assert "report.json is there, and is no report" in run_command(*options, code=2)
        (out / "report.json").unlink()
    run_command(*options, "--also", "nrrd", "--overwrite")
    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(out / "nrrd" / "a.nrrd")))
    np.testing.assert_array_equal(labels.T, np.asarray(nib.load(out / "a.nii.gz").dataobj))
    before = (out / "nrrd" / "a.nrrd").stat().st_mtime_ns
    run_command(*options, "--also", "nrrd")
    assert (out / "nrrd" / "a.nrrd").stat().st_mtime_ns == before
    run_command(*options)
    assert not (out / "nrrd" / "a.nrrd").exists()  # not asked for: it might be of another result


@pytest.mark.parametrize("folder", ["nrrd", "mha", "dicom-seg", "probabilities", "previews"])
def test_inputs_may_not_lie_where_results_go(tumour, tmp_path, folder):
    four_modalities(tmp_path / folder, "a")
    before = {file: file.read_bytes() for file in (tmp_path / folder).iterdir()}
    options = ["predict", "--checkpoint", tumour, "--input", tmp_path / folder, "--output", tmp_path]
    assert f"{folder} holds the inputs" in run_command(*options, code=2)
    assert {file: file.read_bytes() for file in (tmp_path / folder).iterdir()} == before


def test_links_to_inputs_are_inputs(tumour, tmp_path):
    """As data management makes them: a result would take a link's place."""
    four_modalities(tmp_path / "data", "a")
    links = tmp_path / "links"
    links.mkdir()
    for file in (tmp_path / "data").iterdir():
        (links / file.name).symlink_to(file)
    before = {file: file.read_bytes() for file in (tmp_path / "data").iterdir()}
    options = ["--checkpoint", tumour, "--input", links, "--output"]
    for command in (["predict", "--overwrite"], ["explain"]):
        for folder in (links, tmp_path / "data"):
            assert f"{folder.name} holds the inputs" in run_command(*command, *options, folder, code=2)
    assert all(link.is_symlink() for link in links.iterdir())
    assert {file: file.read_bytes() for file in (tmp_path / "data").iterdir()} == before


def test_labels_of_a_list_are_inputs(tumour, tmp_path):
    four_modalities(tmp_path / "in", "a")
    images = [str(file) for file in sorted((tmp_path / "in").iterdir())]
    label = tmp_path / "labels" / "a.nii.gz"
    label.parent.mkdir()
    nib.save(nib.Nifti1Image(np.zeros(nib.load(images[0]).shape[:3], np.uint8), np.eye(4)), label)
    before = label.read_bytes()
    (tmp_path / "list.json").write_text(json.dumps([{"image": images, "label": str(label)}]))
    options = ["predict", "--checkpoint", tumour, "--input", tmp_path / "list.json", "--overwrite"]
    assert "labels holds the inputs" in run_command(*options, "--output", label.parent, code=2)
    assert label.read_bytes() == before


@pytest.mark.parametrize(("regions", "rotated"), [(None, False), (REGIONS, False), (None, True)])
def test_where_no_network_looked_all_is_background(tmp_path, regions, rotated):
    labels = TUMOUR if regions else {0: "background", 1: "thing"}
    network = checkpoint_for(plan_for(("MRI",), labels, regions), tmp_path / "c.pt")
    voxels = np.zeros((24, 22, 20), np.float32)
    voxels[6:18, 5:16, 4:15] = np.random.default_rng(0).gamma(2, 100, (12, 11, 11))
    affine = np.eye(4)
    if rotated:
        affine[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    (tmp_path / "in").mkdir()
    nib.save(nib.Nifti1Image(voxels, affine), tmp_path / "in" / "a.nii.gz")
    options = ["--input", tmp_path / "in", "--output", tmp_path / "out", "--probabilities"]
    run_command("predict", "--checkpoint", network, *options)
    found = np.load(tmp_path / "out" / "probabilities" / "a.npz")["probabilities"].astype(np.float32)
    inside, outside = found[:, 8:14, 8:13, 7:12], found[:, :3, :2, :1]
    assert ((inside > 0) & (inside < 1)).all()
    assert (outside == (np.zeros(3) if regions else np.array([1, 0])).reshape(-1, 1, 1, 1)).all()
    if not regions:
        np.testing.assert_allclose(found.sum(0), 1, atol=2e-3)
    labels = np.asarray(nib.load(tmp_path / "out" / "a.nii.gz").dataobj)
    sure = (np.abs(found - 0.5) > 1e-3).all(0)  # they are rounded to half precision
    wanted = (found > 0.5).any(0) if regions else found.argmax(0) > 0
    np.testing.assert_array_equal((labels > 0)[sure], wanted[sure])


def test_predict_tells_what_is_odd(tumour, tmp_path):
    for name in ("flat", "twice", "loop", "coarse"):
        affine = np.diag([1.0, 1, 4 if name == "coarse" else 1, 1])
        four_modalities(tmp_path / "in", name, affine=affine)
    flat = nib.load(tmp_path / "in" / "flat_0001.nii.gz")
    nib.save(nib.Nifti1Image(np.full(flat.shape, 7.0), flat.affine), tmp_path / "in" / "flat_0001.nii.gz")
    (tmp_path / "in" / "twice_0003.nii.gz").write_bytes((tmp_path / "in" / "twice_0000.nii.gz").read_bytes())
    link = tmp_path / "in" / "loop_0002.nii.gz"
    link.unlink()
    link.symlink_to(link)
    options = ["--input", tmp_path / "in", "--output", tmp_path / "out"]
    printed = run_command("predict", "--checkpoint", tumour, *options, code=1)
    assert "warning: flat: T1w holds a single value" in printed
    assert "warning: twice: FLAIR and T2w are the same volume" in printed
    assert "warning: coarse: its voxels are 1 x 1 x 4 mm large, the network's 1 x 1 x 1 mm" in printed
    assert printed.count("warning: ") == 3
    assert "loop_0002.nii.gz: there is no such file" in printed
    assert sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz")) == [
        "coarse.nii.gz",
        "flat.nii.gz",
        "twice.nii.gz",
    ]


def test_predict_writes_probabilities(tumour, tmp_path):
    four_modalities(tmp_path / "in", "a", affine=ODD)
    out = tmp_path / "out"
    options = ["predict", "--checkpoint", tumour, "--input", tmp_path / "in", "--output", out]
    run_command(*options)
    run_command(*options, "--probabilities")
    file = out / "probabilities" / "a.npz"
    content = np.load(file)
    assert content["names"].tolist() == list(REGIONS)
    assert content["probabilities"].dtype == np.float16
    np.testing.assert_allclose(content["affine"], ODD)
    voxels = np.asarray(nib.load(out / "a.nii.gz").dataobj)
    inside = content["probabilities"][list(REGIONS).index("WT")].astype(np.float32)
    assert ((inside > 0.5) <= (voxels > 0)).all()
    assert ((inside < 0.499) <= (voxels != 1)).all()
    assert "1 were there" in run_command(*options, "--probabilities")
    run_command(*options, "--overwrite", "--no-mirror")
    assert not file.exists()


def test_parts_of_a_job_array_share_the_cases(tumour, tmp_path, monkeypatch):
    names = ["a", "b", "c", "d"]
    for name in names:
        four_modalities(tmp_path / "in", name, shape=(8, 8, 8))
    out = tmp_path / "out"
    options = ["predict", "--checkpoint", tumour, "--input", tmp_path / "in", "--output", out, "--statistics"]
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    made = []
    for part, expected in ((3, 1), (1, 2), (2, 1)):
        printed = run_command(*options, "--part", f"{part}/3")
        assert f"{expected} segmented" in printed
        assert "memory" not in printed
        report = json.loads((out / f"report-{part}-of-3.json").read_text())
        assert report["peak_gib"] is None
        made += [case["name"] for case in report["cases"]]
        with (out / f"statistics-{part}-of-3.csv").open() as file:
            assert {row["case"] for row in csv.DictReader(file)} == set(made[-expected:])
    assert sorted(made) == names
    assert "0 segmented, 1 were there" in run_command(*options, "--part", "2/3")
    assert not (out / "statistics.csv").exists()
    assert "0 segmented, 4 were there" in run_command(*options)
    with (out / "statistics.csv").open() as file:
        assert [row["case"] for row in csv.DictReader(file)][:: len(REGIONS)] == names
    assert "0 segmented, 0 were there" in run_command(*options, "--part", "7/9")
    for part in ("0/3", "4/3", "3", "a/3", "1/"):
        assert f"part: got '{part}'; it must be such as 3/16" in run_command(*options, "--part", part, code=2)


def test_a_bad_label_costs_the_picture_alone(tmp_path):
    checkpoint = checkpoint_for(plan_for(modalities=("A",)), tmp_path / "c.pt")
    entries = []
    for name, depth in (("good", 16), ("other", 15), ("missing", None)):
        save_volume(tmp_path / "in" / f"{name}.nii.gz", (16, 18, 16), varied=True)
        if depth:
            save_volume(tmp_path / "labels" / f"{name}.nii.gz", (16, 18, depth))
        entries.append({"image": f"in/{name}.nii.gz", "label": f"labels/{name}.nii.gz"})
    (tmp_path / "list.json").write_text(json.dumps({"training": entries}))
    out = tmp_path / "out"
    options = ["--checkpoint", checkpoint, "--input", tmp_path / "list.json", "--output", out, "--preview"]
    printed = run_command("predict", *options)
    assert "3 segmented" in printed
    assert ", 0 failed" in printed
    assert "warning: other: no picture: " in printed
    assert "warning: missing: no picture: " in printed
    assert {path.name for path in (out / "previews").glob("*.png")} == {"good.png"}
    save_volume(tmp_path / "labels" / "good.nii.gz", (16, 18, 15))
    assert "warning: good: no picture: " in run_command("predict", *options)
    assert not list((out / "previews").glob("*.png"))  # it showed another label


def test_what_parts_told_of_other_results_is_removed(tmp_path):
    save_volume(tmp_path / "in" / "a.nii.gz", (16, 16, 16), varied=True)
    save_volume(tmp_path / "in" / "b.nii.gz", (16, 16, 16), varied=True)
    networks = [
        checkpoint_for(plan_for(modalities=("A",), seed=seed), tmp_path / f"{seed}.pt") for seed in (0, 1)
    ]
    out = tmp_path / "out"
    options = ["predict", "--input", tmp_path / "in", "--output", out, "--statistics", "--checkpoint"]
    for part in ("1/2", "2/2"):
        run_command(*options, networks[0], "--part", part)
    of_parts = {
        f"{name}-{k}-of-2.{end}" for k in (1, 2) for name, end in (("statistics", "csv"), ("report", "json"))
    }
    (out / "report-of-my-own-of-3.json").write_text("{}")
    (out / "statistics-1-of-3.csv").mkdir()
    run_command(*options, networks[0])  # nothing is made: they still hold
    assert of_parts <= {path.name for path in out.iterdir()}
    run_command(*options, networks[1], "--overwrite")
    names = {path.name for path in out.iterdir()}
    assert not of_parts & names
    assert {"statistics.csv", "report.json", "report-of-my-own-of-3.json", "statistics-1-of-3.csv"} <= names


def test_a_folder_in_the_place_of_the_statistics(tmp_path):
    save_volume(tmp_path / "in" / "a.nii.gz", (16, 16, 16), varied=True)
    checkpoint = checkpoint_for(plan_for(modalities=("A",)), tmp_path / "c.pt")
    out = tmp_path / "out"
    (out / "statistics.csv").mkdir(parents=True)
    options = ["predict", "--checkpoint", checkpoint, "--input", tmp_path / "in", "--output", out]
    assert "statistics.csv is there, and is no file" in run_command(*options, "--statistics", code=2)
    assert not (out / "a.nii.gz").exists()
    assert "1 segmented" in run_command(*options)
    assert (out / "statistics.csv").is_dir()
    assert (out / "report.json").is_file()
