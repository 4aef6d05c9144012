"""Decathlon folders: what is read from them, and what is wrong with them; other ways to name cases."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from factorizer_support import save_volume

from factorizer.segmentation.cases import (
    Case,
    Task,
    find_cases,
    read_classes,
    read_decathlon,
    read_split,
    split_cases,
)
from factorizer.segmentation.errors import DataError
from factorizer.segmentation.survey import check_case
from factorizer.segmentation.tumours import brats_classes
from factorizer.segmentation.volumes import check_image


@pytest.fixture
def folder(synthetic, tmp_path):
    return shutil.copytree(synthetic, tmp_path / "task")


def edit(folder, **changes):
    path = folder / "dataset.json"
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_reads_what_the_folder_says(folder):
    task = read_decathlon(folder)
    assert task.name == "Synthetic lesions"
    assert task.modalities == ("contrast A", "contrast B")
    assert task.labels == {0: "background", 1: "halo", 2: "core"}
    assert [case.name for case in task.cases] == [f"synthetic_{i:03d}" for i in range(1, 6)]
    for case in task.cases:
        nonzero = np.asarray(nib.load(case.image).dataobj).any(axis=3)
        box = tuple(np.ptp(places) + 1 for places in np.nonzero(nonzero))
        geometry = check_case(task, case)
        assert geometry.shape == box
        assert geometry.spacing == (1, 1, 1)
        voxels, label = (np.asarray(nib.load(f).dataobj) for f in (case.image, case.label))
        for channel, window in enumerate(geometry.windows):
            assert window == pytest.approx(np.quantile(voxels[label > 0, channel], (0.005, 0.995)))
        assert geometry.labelled == dict(zip(*np.unique(label, return_counts=True), strict=True))


def test_labels_are_sorted_by_value(folder):
    edit(folder, labels={"10": "b", "0": "background", "9": "a", "2": "core", "1": "halo"})
    assert list(read_decathlon(folder).labels) == [0, 1, 2, 9, 10]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"modality": None}, "'modality' is missing"),
        ({"labels": None}, "'labels' is missing"),
        ({"training": None}, "'training' is missing"),
        ({"labels": ["background", "halo"]}, "'labels' is"),
        ({"training": []}, "'training' is"),
        ({"labels": {"background": 0, "halo": "one"}}, "'labels' must be label values"),
        ({"labels": {"background": 0, "halo": 1, "core": 1}}, "two names have one value"),
        ({"labels": {"0": "background", "1": "halo", "2": "halo"}}, "calls two values 'halo'"),
        ({"labels": {"0": "halo", "1": "background"}}, "calls 1 background"),
        ({"labels": {"background": 0, "halo": 1, "ignore": 2}}, "'ignore'"),
        ({"labels": {"0": "background", "1": "halo", "2": "Ignore"}}, "'ignore'"),
        ({"labels": {"background": 0, "whole": [1, 2], "part": [2, 3]}}, "must lie in one another"),
        ({"labels": {"background": 0, "whole": [1, 2]}}, "exactly one value"),
        ({"regions": {"whole": [1, 2], "part": [3]}}, "there is no class for 3"),
        (
            {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [2, 1]},
            r"own, in the order of the regions, are \[1, 2\]",
        ),
        (
            {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": 1},
            r"'regions_class_order' is 1; .* are \[1, 2\]",
        ),
        ({"regions": [[1, 2], [2]]}, r"'regions' is \[\[1, 2\], \[2\]\]; it must be an object"),
        ({"regions": {"": [1, 2], "core": [2]}}, "'regions' has the name ''"),
        ({"labels": {"0": "background", "1": "halo", "2": None}}, "'labels' has the name None"),
        ({"labels": {"0": "background", "1": "halo", "2": " "}}, "'labels' has the name ' '"),
        ({"labels": {"background": 0, "": 1}}, "'labels' has the name ''"),
        ({"modality": {"0": "A", "2": "B"}}, "its numbers must be 0, 1"),
        ({"modality": {"2": "A", "3": "B"}}, "its first number must be 0"),
        ({"labels": {"1": "halo", "2": "core"}}, "it needs 0, the background"),
        ({"labels": {"0": "background"}}, "at least one more"),
        ({"labels": {"0": "background", "300": "halo"}}, "none above 255"),
        ({"training": [{"image": "./imagesTr/a.nii.gz"}]}, r"training\[0\]"),
        ({"training": ["./imagesTr/a.nii.gz"]}, r"training\[0\]"),
        (
            {"training": [{"image": "imagesTr/no.nii.gz", "label": "labelsTr/no.nii.gz"}]},
            r"missing: .*imagesTr/no.nii.gz",
        ),
    ],
)
def test_dataset_json_errors(folder, changes, words):
    edit(folder, **changes)
    with pytest.raises(DataError, match=words):
        read_decathlon(folder)


def test_folder_errors(folder, tmp_path):
    with pytest.raises(DataError, match=r"absent is not a folder"):
        read_decathlon(tmp_path / "absent")
    with pytest.raises(DataError, match=r"dataset\.json is missing"):
        read_decathlon(tmp_path)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="not readable as JSON"):
        read_decathlon(folder)
    (folder / "dataset.json").write_text("[]")
    with pytest.raises(DataError, match="must hold a JSON object"):
        read_decathlon(folder)


def test_modalities_are_in_the_order_of_their_numbers(folder):
    for field, names in (
        ("modality", {"1": "T1", "0": "FLAIR"}),
        ("channel_names", {"1": "T1", "0": "FLAIR"}),
        ("modality", {"T1": 1, "FLAIR": 0}),
        ("modality", {"2": "T1", "1": "FLAIR"}),
        ("modality", ["FLAIR", "T1"]),
    ):
        edit(folder, modality=None, channel_names=None)
        edit(folder, **{field: names})
        assert read_decathlon(folder).modalities == ("FLAIR", "T1")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_json_in_other_encodings(folder, encoding):
    path = folder / "dataset.json"
    path.write_text(path.read_text(), encoding=encoding)
    assert len(read_decathlon(folder).cases) == 5


def test_classes_and_regions_by_name(folder):
    edit(folder, labels={"core": 2, "background": 0, "halo": 1})
    task = read_decathlon(folder)
    assert task.labels == {0: "background", 1: "halo", 2: "core"}
    assert task.regions == {}
    edit(folder, labels={"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=[1, 2])
    task = read_decathlon(folder)
    assert task.labels == {0: "background", 1: "whole", 2: "core"}
    assert task.regions == {"whole": (1, 2), "core": (2,)}
    assert read_classes(folder / "dataset.json") == (task.labels, task.regions)
    edit(folder, labels={"0": "background", "1": "a", "2": "b"}, regions={"all": [1, 2], "b": [2]})
    assert read_decathlon(folder).regions == {"all": (1, 2), "b": (2,)}


def test_raw_folders_of_nnunet(folder):
    """Version 1 lists files without the numbers that they have, version 2 lists none."""
    for path in (folder / "imagesTr").iterdir():
        image = nib.load(path)
        for channel in range(2):
            name = path.name.replace(".nii.gz", f"_000{channel}.nii.gz")
            nib.save(image.slicer[..., channel], path.with_name(name))
        path.unlink()
    first = read_decathlon(folder)
    edit(folder, modality=None, training=None, channel_names={"0": "A", "1": "B"}, file_ending=".nii.gz")
    second = read_decathlon(folder)
    for task in (first, second):
        assert [case.name for case in task.cases] == [f"synthetic_{i:03d}" for i in range(1, 6)]
        assert [path.name for path in task.cases[0].images] == [
            f"synthetic_001_000{channel}.nii.gz" for channel in range(2)
        ]
        for case in task.cases:
            check_case(task, case)
    assert [case.name for case in find_cases([folder], labelled=True)] == [c.name for c in second.cases]
    (folder / "imagesTs").mkdir()
    for channel in range(2):
        save_volume(folder / f"imagesTs/new_000{channel}.nii.gz")
    assert [case.name for case in find_cases([folder])] == ["new"]
    for other in ("other.nii.gz", "other_0001.nii.gz"):  # that would be left out
        save_volume(folder / "imagesTs" / other)
        with pytest.raises(DataError, match=rf"{other} is no first modality of a case"):
            find_cases([folder])
        (folder / "imagesTs" / other).unlink()
    (folder / "imagesTr/synthetic_002_0001.nii.gz").rename(folder / "imagesTr/synthetic_002_0002.nii.gz")
    with pytest.raises(DataError, match=r"missing: .*synthetic_002_0001\.nii\.gz"):
        read_decathlon(folder)
    (folder / "imagesTr/synthetic_001_0000.nii.gz").unlink()
    with pytest.raises(DataError, match=r"synthetic_001_0000\.nii\.gz is missing; there is a label"):
        read_decathlon(folder)
    edit(folder, file_ending=".png")
    with pytest.raises(DataError, match=r"'file_ending' is '\.png'"):
        read_decathlon(folder)


def test_names_of_cases(tmp_path):
    def named(*entries):
        (tmp_path / "list.json").write_text(json.dumps(entries))
        return [case.name for case in find_cases([tmp_path / "list.json"])]

    assert named({"image": "p1/flair.nii"}, {"image": "p2/flair.nii"}) == ["p1", "p2"]
    assert named({"image": "a/p1/x.nii"}, {"image": "b/p1/x.nii"}) == ["a", "b"]
    assert named({"image": "a/p1/x.nii"}, {"image": "b/p1/x.nii"}, {"image": "b/p2/x.nii"}) == [
        *("a_p1", "b_p1", "b_p2"),
    ]
    assert named({"image": "x.nii"}, {"image": "a/x.nii"}) == ["x", "a_x"]
    assert named({"image": "x.nii", "name": "P 7"}, {"image": "a/x.nii", "id": 8}) == ["P 7", "8"]
    for names in (("flair", "t1", "t1ce"), ("FLAIR", "T1", "T2")):
        both = [[f"p{k}/{name}.nii" for name in names] for k in (1, 2)]
        assert named(*({"image": images} for images in both)) == ["p1", "p2"]
    assert named({"image": ["B_1_flair.nii", "B_1_t1.nii", "B_1_t1ce.nii"]}) == ["B_1"]
    assert named({"image": ["B_1_t1.nii", "B_1_t1ce.nii"]}) == ["B_1"]
    assert named({"image": ["flair/case_2.nii", "t1/case_2.nii"]}) == ["case_2"]
    for k in (1, 2):
        (tmp_path / f"p{k}").mkdir()
        save_volume(tmp_path / f"p{k}/scan.nii.gz")
    assert [case.name for case in find_cases([tmp_path / "p1", tmp_path / "p2"])] == ["p1", "p2"]
    assert [case.name for case in find_cases([tmp_path / "p1"])] == ["scan"]
    with pytest.raises(DataError, match=r"holds no volume, but folders; name the cases in a data list"):
        find_cases([tmp_path])
    (tmp_path / "q").mkdir()
    for name in ("scan", "scan_0000"):
        save_volume(tmp_path / "q" / f"{name}.nii.gz")
    with pytest.raises(DataError, match=r"are both modality 0 of the case 'scan'"):
        find_cases([tmp_path / "q"])


def test_a_missing_modality_is_looked_for(tmp_path):
    """A third file is not the second modality: the case fails by the name of the missing one."""
    for number in (0, 2):
        save_volume(tmp_path / f"a_000{number}.nii.gz")
    (case,) = find_cases([tmp_path])
    assert [path.name for path in case.images] == [f"a_000{number}.nii.gz" for number in range(3)]
    with pytest.raises(DataError, match=r"a_0001\.nii\.gz: there is no such file"):
        check_image(case, ("A", "B", "C"))
    with pytest.raises(DataError, match=r"a_0001\.nii\.gz: there is no such file"):
        check_image(case, ("A", "B"))
    with pytest.raises(DataError, match="their numbers must be _0000, _0001"):
        find_cases([f"{tmp_path}/a_0000.nii.gz,{tmp_path}/a_0002.nii.gz"])


@pytest.mark.parametrize("ending", [".NII.GZ", ".Nii", ".img"])
def test_endings_of_files(tmp_path, ending):
    save_volume(tmp_path / "a.nii")
    nib.save(nib.Nifti1Pair(np.ones((4, 5, 6), np.float32), np.eye(4)), tmp_path / "b.img")
    name = f"b{ending}" if ending == ".img" else f"a{ending}"
    if ending == ".NII.GZ":
        nib.save(nib.load(tmp_path / "a.nii"), tmp_path / "a.nii.gz")
        (tmp_path / "a.nii.gz").rename(tmp_path / name)
    elif ending == ".Nii":
        (tmp_path / "a.nii").rename(tmp_path / name)
    (case,) = find_cases([tmp_path / name])
    assert case.name == name[0]
    check_image(case, ("A",))
    if ending == ".img":
        assert find_cases([tmp_path / "b.hdr"]) == (case,)
        assert [case.name for case in find_cases([tmp_path])] == ["a", "b"]


def test_a_folder_that_is_called_like_a_file(tmp_path):
    (tmp_path / "images" / "a.nii").mkdir(parents=True)
    file = save_volume(tmp_path / "images" / "a.nii" / "a.nii")
    words = r"images/a\.nii: is a folder that is called like a file, .* holds a\.nii\. Give the file in it"
    with pytest.raises(DataError, match=words):
        find_cases([tmp_path / "images"])
    (tmp_path / "list.json").write_text('["images/a.nii"]')
    (listed,) = find_cases([tmp_path / "list.json"])
    with pytest.raises(DataError, match=words):
        check_image(listed, ("A",))
    assert find_cases([file.parent])[0].images == (file,)


def test_too_few_cases(folder):
    training = json.loads((folder / "dataset.json").read_text())["training"]
    edit(folder, training=training[:2])
    with pytest.raises(DataError, match="too few cases: 2; at least 3"):
        read_decathlon(folder)


def test_two_cases_of_one_name(folder):
    training = json.loads((folder / "dataset.json").read_text())["training"]
    edit(folder, training=[*training, training[0]])
    with pytest.raises(DataError, match="two cases are called 'synthetic_001'"):
        read_decathlon(folder)


def test_split_is_seeded_disjoint_and_blind_to_order(synthetic):
    cases = read_decathlon(synthetic).cases
    cases = [Case(f"{i:02d}", case.images, case.label) for i in range(10) for case in cases[:1]]
    training, held_out = split_cases(cases, seed=0)
    assert len(training) == 8
    assert sorted(training + held_out, key=lambda case: case.name) == cases
    assert split_cases(cases[::-1], seed=0) == (training, held_out)
    assert split_cases(cases, seed=1) != (training, held_out)


def test_folds_hold_every_case_out_once(synthetic):
    case = read_decathlon(synthetic).cases[0]
    cases = [Case(f"{i:02d}", case.images, case.label) for i in range(12)]
    splits = [split_cases(cases, seed=0, fold=fold) for fold in range(5)]
    assert sorted(c.name for _, held_out in splits for c in held_out) == [c.name for c in cases]
    assert all(set(t) | set(h) == set(cases) for t, h in splits)
    with pytest.raises(DataError, match="fold: got 5 of 5 folds"):
        split_cases(cases, seed=0, fold=5)


def test_ways_to_name_cases(tmp_path):
    for name in ("a_0000", "a_0001", "b_0000", "b_0001", "c"):
        save_volume(tmp_path / f"{name}.nii.gz")
    (tmp_path / ".part-d.nii.gz").touch()  # what a killed run may leave
    a, b, c = find_cases([tmp_path])
    assert [case.name for case in (a, b, c)] == ["a", "b", "c"]
    assert [path.name for path in a.images] == ["a_0000.nii.gz", "a_0001.nii.gz"]
    assert len(c.images) == 1
    pair = ",".join(map(str, b.images))
    assert find_cases([pair]) == (b,)
    assert [case.name for case in find_cases([b.images[0], c.image])] == ["b_0000", "c"]
    (tmp_path / "a_0000.nii.gz").unlink()  # without a first modality these are numbers of cases
    assert [case.name for case in find_cases([tmp_path])] == ["a_0001", "b", "c"]
    save_volume(tmp_path / "a_0000.nii.gz")
    with_comma = save_volume(tmp_path / "one, two.nii")
    assert find_cases([with_comma])[0].images == (with_comma,)
    with_comma.rename(tmp_path / "c.nii")
    with pytest.raises(DataError, match="two cases are called 'c'"):
        find_cases([tmp_path])
    entries = [{"image": ["a_0000.nii.gz", "a_0001.nii.gz"]}, {"image": "c.nii.gz", "label": "l.nii.gz"}]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    listed = find_cases([tmp_path / "list.json"])
    assert [case.name for case in listed] == ["a", "c"]
    assert listed[0].images == tuple(path.resolve() for path in a.images)
    assert listed[1].label == (tmp_path / "l.nii.gz").resolve()


@pytest.mark.parametrize("given", ["", " ", "a.nii,", "a.nii,,a.nii"])
def test_an_input_that_names_nothing_is_not_the_current_folder(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    save_volume(tmp_path / "a.nii")
    with pytest.raises(DataError, match=f"input: got '{given}'"):
        find_cases([given])


def test_sections_of_a_data_list(tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"test": [], "training": [{"image": "a.nii", "label": "b.nii"}]}))
    assert [case.name for case in find_cases([path])] == ["a"]
    path.write_text(json.dumps({"test": ["c.nii"], "training": [{"image": "a.nii"}]}))
    assert [case.name for case in find_cases([path])] == ["c"]
    assert [case.name for case in find_cases([path], "training")] == ["a"]
    assert find_cases([tmp_path], "training") == find_cases([path], "training")
    with pytest.raises(DataError, match="needs a list 'validation'"):
        find_cases([path], "validation")
    path.write_text(json.dumps({"test": ["c.nii"], "training": [{"image": "a.nii", "label": "b.nii"}]}))
    assert [case.name for case in find_cases([path], labelled=True)] == ["a"]
    with pytest.raises(DataError, match="no case has a label"):
        find_cases([path], "test", labelled=True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not readable as JSON"),
        ("[1]", r"entry\[0\] is 1"),
        ('[{"image": []}]', r"entry\[0\]"),
        ('[{"image": "a.nii", "label": 3}]', r"entry\[0\]"),
        ('["a.nii", "a.nii.gz"]', "two cases are called 'a'"),
        ('["Case.nii", "case.nii"]', "two cases are called 'case' and 'Case', one file on some file systems"),
        ('["\u00e9.nii", "e\u0301.nii"]', "one file on some file systems; names must differ"),
        ('[{"image": "a.nii", "name": "x"}, {"image": "b.nii", "id": "x"}]', "two cases are called 'x'"),
        ('[{"image": "a.nii", "name": "../x"}]', r"called '\.\./x'"),
        ('[{"image": "a.nii", "name": ["x"]}]', "must be a text"),
        ('[{"image": "a.nii", "image": "b.nii"}]', "'image' is there twice"),
        ('[{"image": ["a_0001.nii", "a_0000.nii"]}]', "a_0001.nii, a_0000.nii; their numbers must be"),
        ('[{"image": ["a_0000.nii", "a_0002.nii"]}]', "Add the missing file"),
        ("[]", "no cases"),
    ],
)
def test_data_list_errors(tmp_path, content, words):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(DataError, match=words):
        find_cases([tmp_path / "list.json"])


def test_a_split_of_ones_own(tmp_path):
    cases = [Case(name, ()) for name in "abcde"]
    path = tmp_path / "split.json"

    def split(content, fold=None):
        path.write_text(json.dumps(content))
        return [[case.name for case in part] for part in read_split(path, cases, fold)]

    assert split({"training": ["c", "a"], "held_out": ["b"]}) == [["a", "c"], ["b"]]
    splits = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["c", "d"], "val": ["a"]}]
    assert split(splits, 1) == [["c", "d"], ["a"]]
    assert split(splits) == [["a", "b"], ["c"]]
    for content, fold, words in (
        ({"training": ["a", "x"], "held_out": ["b"]}, None, "names 'x', and no case is called that"),
        ({"training": ["a", "b"], "held_out": ["b"]}, None, "names 'b' twice"),
        ({"training": ["a"]}, None, "must hold"),
        ({"training": [], "held_out": ["b"]}, None, "must hold"),
        (splits, 2, "fold: got 2; .* has 2 splits"),
        ({"training": ["a"], "held_out": ["b"]}, 0, "holds a single split"),
    ):
        with pytest.raises(DataError, match=words):
            split(content, fold)


def test_brain_tumours_in_every_numbering():
    def classes(labels, regions=None):
        return brats_classes(Task("t", ("A",) * 4, labels, (), regions or {}))

    wanted = {
        "edema, non-enhancing, enhancing": (
            {1: "edema", 2: "non-enhancing tumor", 3: "enhancing tumour"},
            1,
            2,
            3,
        ),
        "BraTS 2018": ({1: "NCR/NET", 2: "ED", 4: "ET"}, 2, 1, 4),
        "by its values": ({1: "a", 2: "b", 4: "c"}, 2, 1, 4),
        "BraTS 2023": ({1: "necrotic core", 2: "peritumoral edema", 3: "enhancing"}, 2, 1, 3),
    }
    for labels, edema, core, enhancing in wanted.values():
        found, regions = classes({0: "background", **labels})
        assert found[edema] == "edema"
        assert regions["ET"] == (enhancing,)
        assert regions["TC"] == tuple(sorted((core, enhancing)))
        assert regions["WT"] == tuple(sorted((edema, core, enhancing)))
    given = {"WT": (1, 2), "TC": (2,)}
    assert classes({0: "background", 1: "x", 2: "y"}, given)[1] == given
    with pytest.raises(DataError, match="their names must say which value is edema"):
        classes({0: "background", 1: "a", 2: "b", 3: "c"})


def test_names_that_windows_does_not_take(tmp_path, monkeypatch):
    names = ["a:b", "con", "Lpt1.x", "trailing.", "what?"]
    for name in [*names, "console", "com"]:
        save_volume(tmp_path / f"{name}.nii")
    assert len(find_cases([tmp_path])) == 7
    monkeypatch.setattr("factorizer.segmentation.names.WINDOWS", True)
    for name in names:
        with pytest.raises(DataError, match="as no file on Windows can be"):
            find_cases([tmp_path / f"{name}.nii"])
    assert find_cases([tmp_path / "console.nii", tmp_path / "com.nii"])
