"""CONTRIBUTING.md, followed to the letter: its example operator is added to a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_imports import check

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r'^```python title="(.+?)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)

# What the example's author would write as tests: run where Triton is interpreted.
PROGRAM = """
import torch
from torch.autograd import gradcheck, gradgradcheck

import factorizer_kernels as fk

x, weight = torch.rand(2, 3, 2, 5, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
leaves = [x.requires_grad_(), weight.requires_grad_()]
function = fk.scale_channels
with fk.use_backend("reference"):
    expected = function(x, weight)
assert function(x, weight).grad_fn.name() != "ScaleChannelsBackward"  # by itself: no kernel for the CPU
try:
    function(x, weight[:2])
except ValueError as error:
    assert "weight must have one entry per channel (3), got (2,)" in str(error)
with fk.use_backend("cpu") if fk.backends()[2].available else fk.use_backend("reference"):
    try:
        function(x, weight)
    except ValueError as error:
        assert "backend 'cpu' does not run scale_channels here: it has no scale_channels" in str(error)
with fk.use_backend("triton"):
    y = function(x, weight)
    assert y.grad_fn.name() == "ScaleChannelsBackward"
    torch.testing.assert_close(y, expected)
    for layout in (x.mT, x[::2], x[..., ::2], x[:1].expand(2, 3, 2, 5), x[:0]):
        torch.testing.assert_close(function(layout, weight), layout * weight[:, None, None])
    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)  # through the fallback
    mapped, weights = torch.rand(4, *x.shape, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
    for dims in ((0, None), (None, 0), (0, 0)):
        arguments = (mapped if dims[0] == 0 else x, weights if dims[1] == 0 else weight)
        each = [[a[i] if d == 0 else a for a, d in zip(arguments, dims)] for i in range(4)]
        torch.testing.assert_close(
            torch.func.vmap(function, dims)(*arguments), torch.stack([function(*one) for one in each])
        )
        slope = torch.func.grad(lambda x, weight: function(x, weight).square().sum(), (0, 1))
        found = torch.func.vmap(slope, dims)(*arguments)
        for ours, theirs in zip(found, zip(*[slope(*one) for one in each])):
            torch.testing.assert_close(ours, torch.stack(theirs))
    operators = torch.ops.factorizer_kernels
    torch.library.opcheck(operators.scale_channels.default, (x.detach(), weight.detach(), "triton"))
    arguments = (y.detach(), x.detach(), weight.detach(), "triton")
    torch.library.opcheck(operators.scale_channels_backward.default, arguments)
print("the operator works")
"""


def files() -> dict[str, str]:
    """The files of the page's example, by their path."""
    return dict(FENCE.findall((ROOT / "CONTRIBUTING.md").read_text()))


@pytest.fixture
def package(tmp_path):
    """A copy of the package with the example."""
    shutil.copytree(
        ROOT / "factorizer_kernels",
        tmp_path / "factorizer_kernels",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for path, text in files().items():
        file = tmp_path / path
        if file.exists():  # the one outside the folder
            text = f"{file.read_text()}\n{text}"
        file.parent.mkdir(exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(text)
    return tmp_path


def test_the_example_works(package):
    pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": str(package), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "error::UserWarning", "-c", PROGRAM]
    done = subprocess.run(command, env=environment, cwd=package, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the operator works" in done.stdout


def test_the_example_keeps_the_laws(package):
    check(package)


def test_the_example_touches_one_file_outside_its_folder():
    outside = [path for path in files() if not path.startswith("factorizer_kernels/ops/scale/")]
    assert outside == ["factorizer_kernels/__init__.py"]
