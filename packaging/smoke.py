"""Uses an installed factorizer_kernels, away from a checkout: run by wheels.py and by cibuildwheel."""

import importlib.util
import sys
from pathlib import Path


def module_alone() -> str:
    """Loads the compiled module without torch, if there is one, and asks what it would run."""
    folder = Path(importlib.util.find_spec("factorizer_kernels").origin).parent
    files = [file for file in folder.glob("_native.*") if file.suffix in (".so", ".pyd")]
    if not files:
        return f"no compiled module: {(folder / '_left_out.txt').read_text().strip()}"
    spec = importlib.util.spec_from_file_location("_native", files[0])
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    return f"the compiled module loads, {native.isa()} of {native.compiled_isas().rstrip(',')}"


def with_torch() -> str:
    """One value and gradient on every backend of the CPU, against the reference in float64."""
    import torch

    import factorizer_kernels as fk

    torch.manual_seed(0)
    x, u0, v0 = torch.rand(2, 8, 16, 16, 16), torch.rand(8, 1), torch.rand(64, 1)
    options = {"head_dim": 8, "patch_size": 4, "shifts": [None, 2]}

    def value_and_gradient(name, dtype):
        with fk.use_backend(name):
            leaf = x.to(dtype).requires_grad_()
            y = fk.swin_nmf(leaf, u0.to(dtype), v0.to(dtype), **options)
            return torch.stack([y, *torch.autograd.grad(y.square().sum(), leaf)])

    expected = value_and_gradient("reference", torch.float64)
    names = [b.name for b in fk.backends() if b.available and b.name in ("reference", "cpu")]
    for name in names:
        torch.testing.assert_close(
            value_and_gradient(name, torch.float32).double(), expected, rtol=1e-4, atol=1e-4
        )
    return f"torch {torch.__version__}: {' and '.join(names)} agree"


if __name__ == "__main__":
    print(module_alone() if "--without-torch" in sys.argv else with_torch())
