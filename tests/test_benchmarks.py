"""The benchmarks' harness, at its tiny size: it runs, it reports, and it gives no time to a wrong kernel."""

import importlib
import json
import os
import queue
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

ROOT = Path(__file__).parents[1]

# Kernels off by a thousandth, as a pytest plugin: too little to be seen, too much to be right.
BROKEN = """
from factorizer_kernels.shared import registry

def spoil(kernel):
    def wrong(*args):
        out = kernel.function(*args)
        return (out[0] * 1.001, *out[1:]) if isinstance(out, tuple) else out * 1.001

    return kernel._replace(function=wrong)

def pytest_configure():
    for operator in {operators}:
        registry._KERNELS[operator, "cpu"] = spoil(registry._KERNELS[operator, "cpu"])
"""


def python(*args, cwd=ROOT, **environment):
    # One thread: two would only wait for one another on tensors of this size.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [sys.executable, "-m", *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def benchmarks(selection, out, *options, **environment):
    """A run's stored JSON by (group, contender), and the process that made it."""
    process = python(
        "pytest", "benchmarks", "--benchmark-only", "--size=tiny", "-p", "no:cacheprovider",
        "-k", selection, f"--benchmark-json={out}", *options, **environment,
    )  # fmt: skip
    run = json.loads(out.read_text()) if out.exists() and out.stat().st_size else {"benchmarks": []}
    return {(record["group"], record["name"]): record for record in run["benchmarks"]}, process


def test_runs_and_reports(tmp_path):
    out = tmp_path / "run.json"
    records, process = benchmarks("(numbers and volume) or (nmf and 64 and mu) or 16x16x16", out)
    assert process.returncode == 0, process.stdout
    assert "forward over relu" in process.stdout
    run = json.loads(out.read_text())
    assert run["machine_info"]["versions"]["torch"]
    assert run["machine_info"]["backends"]["reference"]
    assert run["commit_info"]

    record = records["swin_nmf volume, 16x16x16, forward", "ours"]
    median = record["stats"]["median"]
    relu = records["swin_nmf volume, 16x16x16, forward", "relu"]["stats"]["median"]
    assert record["stats"]["rounds"] == len(record["stats"]["data"]) == 2
    assert record["extra_info"]["backend"] == "cpu"
    assert record["extra_info"]["x_relu"] == pytest.approx(median / relu)
    assert records["swin_nmf volume, 16x16x16, forward", "attention, windows"]
    nmf = records["nmf, 64 x 64, rank 8, mu, 20 iterations, forward", "ours"]
    assert 0 < nmf["extra_info"]["residual"] < 0.5

    report = python("benchmarks.report", out, tmp_path / "docs")
    assert report.returncode == 0, report.stderr
    page = Path(ROOT, report.stdout.strip()).read_text()
    assert "## Numbers to be held to" in page
    assert "### swin_nmf volume, 16x16x16, forward+backward" in page
    assert len(list((tmp_path / "docs").glob("*-time.png"))) == 1


def test_each_race_of_networks_has_bars_of_its_own():
    """Those of one volume and of two in a batch, which are of one mode."""
    pytest.importorskip("matplotlib")
    from benchmarks.report import plots

    titles = ["network, 64, forward", "network, batch 2, 64, forward"]
    records = [
        {
            "group": title,
            "name": name,
            "stats": {"median": seconds},
            "extra_info": {"family": "network", "mode": "forward", "peak_bytes": 2**30},
        }
        for title in titles
        for name, seconds in (("ours", 1.0), ("UNet", 0.5))
    ]
    ((_, _, figure),) = plots(records)
    assert [axes.get_title() for axes in figure.axes] == [title for title in titles for _ in range(2)]
    assert all(len(axes.patches) == 2 for axes in figure.axes)


def test_a_wrong_kernel_gets_no_time(tmp_path):
    """Wrong in the forward: in neither mode; wrong in the backward: in the mode that has one."""
    operators, caught = ("swin_nmf", "nmf", "depthwise_conv_backward"), {"forward": 2, "forward+backward": 3}
    (tmp_path / "broken_kernels.py").write_text(BROKEN.format(operators=operators))
    records, process = benchmarks(
        "test_operators and ours and ((volume and 8x8x8) or (mu and 20) or 3x3x3)",
        tmp_path / "run.json", "-p", "broken_kernels", PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    assert process.returncode == 1, process.stdout
    assert process.stdout.count("wrong, so not timed") >= sum(caught.values())
    assert f"{sum(caught.values())} failed" in process.stdout
    for mode, count in caught.items():
        timed = [group for group, name in records if name == "ours" and group.endswith(f", {mode}")]
        assert len(timed) == 3 - count


def test_gpu_says_that_there_is_none():
    process = python("benchmarks.gpu")
    assert process.returncode == 1
    assert process.stderr.startswith("benchmarks.gpu needs a CUDA device, and torch sees none")


def test_gpu_page(tmp_path):
    """Its parts that need no GPU: a race becomes records, and these a page."""
    script = '''
import sys
from dataclasses import replace
from pathlib import Path
from benchmarks import gpu
from benchmarks.harness import EFFORTS, cases

def fragile(problem, effort):
    calls = []
    def call(x):
        calls.append(x)
        if len(calls) > 4:
            raise MemoryError("no more")
        return x
    return call

# With a worker, who has the output open too: who waits for its end waits for the worker.
ENDLESS = """
import subprocess
print("[gw3] [ 50%] FAILED another_test ", flush=True)
subprocess.run(["sleep", "600"])
"""
contenders = (
    gpu.on("reference"), gpu.on("cuda"), gpu.RELU, gpu.COPY, gpu.Contender("fragile", fragile)
)
groups = cases("swin_nmf", [("8x8x8, rank 1", gpu.Windows((1, 8, 8, 8, 8)))], contenders)
gpu.PREDICTED["swin_nmf, 8x8x8, rank 1, forward", "reference"] = 1e-6
groups = list(groups)
broken = replace(groups[0], problem=None, label="broken")
parts = (
    gpu.Part("a part", ("-c", "print('well')"), 60),
    gpu.Part("a failing part", ("-c", "print('[gw3] [ 50%] FAILED a_test '); exit('last words')"), 60),
    gpu.Part("an endless part", ("-c", ENDLESS), 5),
)
gpu.main([broken, *groups], EFFORTS["tiny"], Path(sys.argv[1]), parts)
assert len({case.group for case in gpu.all_cases()}) == len(list(gpu.all_cases()))
'''
    (tmp_path / "run_page.py").write_text(script)
    process = python("run_page", tmp_path, PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    assert process.returncode == 0, process.stderr
    page = next(tmp_path.glob("*.md")).read_text()
    assert "Made by `python -m benchmarks.gpu`" in page
    assert "### swin_nmf, 8x8x8, rank 1, forward+backward" in page
    assert "- swin_nmf, 8x8x8, rank 1, forward, cuda: backend 'cuda' cannot be used here" in page
    # Parts that fail, and a group that cannot be set up, hide nothing; contradictions come first.
    assert page.index("## Contradicts the predictions") < page.index("## Tests and training")
    assert "- swin_nmf, 8x8x8, rank 1, forward, reference: " in page.split("## Tests and training")[0]
    assert "- swin_nmf, broken, forward" in page
    assert "- a part: " in page
    assert "- a failing part: exit status 1, " in page
    assert "; last words; FAILED a_test" in page
    assert "- an endless part: stopped after 5 s, " in page
    assert "FAILED another_test" in page
    # What fails in a later round takes no other with it.
    assert "- swin_nmf, 8x8x8, rank 1, forward, fragile: no more" in page


def test_gpu_takes_the_tests_that_compile_little():
    from benchmarks.gpu import TESTS

    process = python("pytest", "--collect-only", "-q", "tests/factorizer_kernels/gpu", "-k", TESTS)
    assert process.returncode == 0, process.stdout
    assert {"test_float32", "test_sanitizer", "test_graph_and_stream"} <= {
        name.split("[")[0] for name in re.findall(r"::(\S+)", process.stdout)
    }
    assert "test_nmf[" not in process.stdout
    assert "fullgraph" not in process.stdout


def test_accuracy_study(tmp_path):
    """Two networks on one split; a second call trains nothing anew; the tables are those of the scores."""
    pytest.importorskip("monai")
    from benchmarks.accuracy import main
    from factorizer.commands.demo import write_synthetic

    data, out = write_synthetic(tmp_path / "data", cases=5, shape=(20, 20, 20)), tmp_path / "out"
    networks = ["UNet", "Local Factorizer, rank 1"]
    options = [option for name in networks for option in ("--network", name)]
    process = python("benchmarks.accuracy", data, "--out", out, "--steps", 1, "--seeds", 1, *options)
    assert process.returncode == 0, process.stderr
    runs = sorted(out.glob("*/scores.json"))
    assert len(runs) == 2
    written = [path.stat().st_mtime_ns for path in runs]

    main(data, out, networks, steps=1, seeds=1)
    assert [path.stat().st_mtime_ns for path in runs] == written
    report = json.loads((out / "accuracy.json").read_text())
    assert [run["network"] for run in report["runs"]] == networks[::-1]
    assert list(report["times"]) == networks[::-1]
    scores = [score["dice"] for score in report["runs"][1]["scores"] if score["target"] == "core"]
    row = next(line for line in (out / "accuracy.md").read_text().splitlines() if "UNet" in line)
    assert f"{sum(scores) / len(scores):.3f}" in row
    assert (out / "accuracy.png").stat().st_size > 10_000

    other = write_synthetic(tmp_path / "other", cases=6, shape=(20, 20, 20))
    with pytest.raises(typer.BadParameter, match="holds records of other data"):
        main(other, out, networks, steps=1, seeds=1)
    (out / "accuracy.of").unlink()
    with pytest.raises(typer.BadParameter, match="holds records of other data"):
        main(data, out, networks, steps=1, seeds=1)
    with pytest.raises(typer.BadParameter, match="no finished run"):
        main(data, tmp_path / "none", seeds=0)
    with pytest.raises(typer.BadParameter, match="UNet"):
        main(data, out, ["VNet"])


def test_distances_are_measured_along_the_axes_of_the_file(tmp_path, monkeypatch):
    """Which are in another order than those of a network."""
    pytest.importorskip("monai")
    import nibabel as nib
    import numpy as np
    from rich.console import Console

    from benchmarks import accuracy
    from factorizer.commands.demo import write_synthetic

    root, lengths = write_synthetic(tmp_path, cases=5, shape=(20, 20, 20)), (3.0, 1.0, 2.0)
    turned = np.eye(4)[[1, 2, 0, 3]] @ np.diag([*lengths, 1])
    for path in root.glob("*/*.nii.gz"):
        nib.save(nib.Nifti1Image(np.asarray(nib.load(path).dataobj), turned), path)
    asked, score_labels = [], accuracy.score_labels

    def score(prediction, truth, targets, spacing, case):
        asked.append(tuple(spacing))
        return score_labels(prediction, truth, targets, spacing, case)

    monkeypatch.setattr(accuracy, "score_labels", score)
    monkeypatch.setattr(accuracy, "_progress", queue.SimpleQueue())
    data = accuracy.read_data(Console(quiet=True), root)
    accuracy.execute(accuracy.Run("UNet", 0, 1, 1e-3), data, tmp_path / "out")
    assert asked == [lengths] * len(data.held_out)
    assert data.geometries[data.held_out[0].name].spacing != lengths


def test_peers_take_volumes_of_any_size():
    """The study validates on whole volumes, whose sizes no stride divides."""
    pytest.importorskip("monai")
    pytest.importorskip("einops")  # SwinUNETR's
    from benchmarks.accuracy import OTHERS

    x = torch.rand(1, 1, 33, 18, 23)
    with torch.no_grad():
        assert {network(1, 3).eval()(x).shape for network in OTHERS.values()} == {(1, 3, *x.shape[2:])}


def test_synthetic_tumours(tmp_path):
    """A task of three modalities and thick slices that is read like any other, the same each time."""
    pytest.importorskip("monai")
    import nibabel as nib
    import numpy as np
    from rich.console import Console

    from benchmarks.tumours import LABELS, SPACING, head, main
    from factorizer.segmentation.cases import read_decathlon
    from factorizer.segmentation.survey import check_cases

    main(tmp_path, cases=3)
    task = read_decathlon(tmp_path)
    assert len(task.cases) == 3
    assert list(task.labels.values()) == list(LABELS.values())
    for geometry in check_cases(Console(quiet=True), task).values():
        assert geometry.spacing == pytest.approx(SPACING)
        assert set(geometry.labelled) >= {1, 2, 3}
    volumes, label = head(np.random.default_rng(0))
    for part, expected in (("imagesTr", volumes), ("labelsTr", label)):
        assert np.array_equal(nib.load(tmp_path / part / "synthetic_001.nii.gz").dataobj, expected)


def test_study(tmp_path):
    """Changes on an inner fold, with and without the factorisation; a second call trains nothing anew."""
    pytest.importorskip("monai")
    from benchmarks.study import main
    from factorizer.commands.demo import write_synthetic

    data = write_synthetic(tmp_path / "data", cases=6, shape=(18, 18, 18))
    out = tmp_path / "out"
    options = ["--steps", 5, "--seeds", 1, "--change", "default", "--change", "UNet", "--jobs", 1]
    process = python("benchmarks.study", data, "--out", out, *options)
    assert process.returncode == 0, process.stderr
    records = [json.loads(path.read_text()) for path in out.glob("*.json")]
    assert len(records) == 3  # the default with and without the factorisation, and UNet
    for record in records:
        assert [step for step, _ in record["dice"]] == [1, 2, 3, 4, 5]
        assert record["step_seconds"] > 0
    rows = (out / "study.md").read_text().splitlines()
    assert sum("| -" in row for row in rows if "UNet" in row) == 1
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    main(data, out, ["default", "UNet"], seeds=1, steps=5, jobs=1)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # what is done is not done again
    assert (out / "study.png").stat().st_size > 10_000

    other = write_synthetic(tmp_path / "other", cases=7, shape=(18, 18, 18))
    with pytest.raises(typer.BadParameter, match="holds records of other data"):
        main(other, out, ["default", "UNet"], seeds=1, steps=5, jobs=1)
    (out / "study.of").unlink()
    with pytest.raises(typer.BadParameter, match="holds records of other data"):
        main(data, out, ["default", "UNet"], seeds=1, steps=5, jobs=1)

    main(data, tmp_path / "timed", ["UNet"], seeds=1, minutes=0.01, jobs=1)
    (path,) = (tmp_path / "timed").glob("*.json")
    timed = json.loads(path.read_text())
    assert timed["steps"] * timed["step_seconds"] == pytest.approx(0.6, abs=timed["step_seconds"])
    assert timed["dice"][-1][0] == timed["steps"] > 1
    with pytest.raises(typer.BadParameter, match="minutes"):
        main(data, out, ["UNet"], steps=5, minutes=1)
    with pytest.raises(typer.BadParameter, match="nothing"):
        main(data, out, ["nothing"])


def test_revisions_are_compared_in_turn_and_only_where_they_agree(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    revisions, order = importlib.import_module("benchmarks.revisions"), []

    class Worker:
        def __init__(self, *answers):
            self.answers = answers

        def ask(self, name, backward):
            order.append(self)
            return self.answers[min(order.count(self), len(self.answers)) - 1]

    old, new = (Worker([9, [5.0, 1.0]], [seconds, [5.0, 1.0]]) for seconds in (3e-3, 2e-3))
    assert revisions.compare((old, new), "case", False, 3) == ["3.0", "2.0", "1.50 (1.50)"]
    assert order == [old, new, new, old, old, new, new, old]
    for other, told in (
        (Worker("AttributeError: no such\nline"), "new: AttributeError: no such"),
        (Worker([9, [5.0, 1.1]]), "the results differ: 1, 1.1"),
        (Worker([9, [float("nan"), 1.0]]), "the results differ: 5, nan"),
    ):
        assert revisions.compare((old, other), "case", False, 3) == ["", "", told]


def test_revisions_compare_each_gradient_on_its_own_scale(monkeypatch):
    """That of x is small beside those of a network's parameters, and may be as wrong."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    revisions = importlib.import_module("benchmarks.revisions")

    class Worker:
        def __init__(self, factors):
            self.factors = factors

        def ask(self, name, backward):
            grad = torch.autograd.grad

            def wrong(*args):
                return [f * g for f, g in zip(self.factors, grad(*args), strict=True)]

            weight, x = 1e-4 * torch.linspace(1, 2, 5), torch.linspace(1, 3, 5)
            with monkeypatch.context() as patch:
                patch.setattr(torch.autograd, "grad", wrong)
                return revisions._timed(lambda x: x * weight, x, [weight.requires_grad_()], backward)

    right = Worker((1, 1))
    assert revisions.compare((right, Worker((1, 1))), "case", True, 1)[0]
    for factors, told in (((1.05, 1), "the gradients of x differ"), ((1, 1.05), "of the parameters differ")):
        assert told in revisions.compare((right, Worker(factors)), "case", True, 1)[2]


def test_a_runtime_that_computes_something_else_is_refused(monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from benchmarks import runtimes

    network, x = torch.nn.Conv3d(1, 2, 3), torch.randn(1, 1, 5, 6, 7)
    function = runtimes.in_runtime("onnxruntime", network, x)
    torch.testing.assert_close(function(x), network(x).detach(), rtol=1e-4, atol=1e-5)
    load = runtimes._LOADERS["onnxruntime"]

    def wrong(path):
        right = load(path)
        return lambda x: 1.001 * right(x)

    monkeypatch.setitem(runtimes._LOADERS, "onnxruntime", wrong)
    with pytest.raises(pytest.fail.Exception, match="wrong, so not timed: the result of onnxruntime is 1"):
        runtimes.in_runtime("onnxruntime", network, x)
