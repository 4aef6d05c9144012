"""Every operator meets the contract: every family is imported, and every backend's file is in use."""

import importlib
import pkgutil
from pathlib import Path

import pytest
import tests_support
import torch

import factorizer_kernels.ops
from factorizer_kernels import choice
from factorizer_kernels.shared import native, registry

FAMILIES = [module.name for module in pkgutil.iter_modules(factorizer_kernels.ops.__path__)]
BACKENDS = [record for record in choice._RECORDS.values() if record.name != "reference"]


def operators_of(family: str) -> list[str]:
    """The operators that a family's spec defines."""
    spec = importlib.import_module(f"factorizer_kernels.ops.{family}.spec")
    overloads = [value for value in vars(spec).values() if isinstance(value, torch._ops.OpOverload)]
    return [overload._schema.name.split("::")[1] for overload in overloads]


def test_every_family_is_imported_with_the_package():
    assert {name for family in FAMILIES for name in operators_of(family)} == tests_support.defined_operators()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda record: record.name)
def test_every_backend_has_kernels_for_all_of_a_family_or_for_none(family, backend):
    kernels = f"factorizer_kernels.ops.{family}.{backend.name}"
    has_file = importlib.util.find_spec(kernels) is not None
    if backend.name == "triton":  # a PyTorch without CUDA leaves its kernels out
        pytest.importorskip("triton")
        if has_file:
            importlib.import_module(kernels)
    elif backend.missing is not None:
        pytest.skip(backend.missing)
    for operator in operators_of(family):
        assert (registry.find(operator, backend.name) is not None) == has_file, operator


def test_every_entry_of_the_module_is_called_wrongly():
    """By test_binding.py and the calls that it shares; those for CUDA by the emulated kernels' tests."""
    if native.native is None:
        pytest.skip(native.missing)
    here = Path(__file__).parent
    tests = [Path(tests_support.__file__), here / "test_binding.py", *(here / "cuda").rglob("*.py")]
    text = "".join(file.read_text() for file in tests)
    asks_only = {"isa", "compiled_isas", "set_team_launcher", "cuda_architectures", "cuda_versions"}
    entries = {
        name
        for name, value in vars(native.native).items()
        if callable(value) and not isinstance(value, type) and name not in asks_only
    }
    assert {entry for entry in entries if entry not in text} == set()
