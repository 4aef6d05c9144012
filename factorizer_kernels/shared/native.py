"""The compiled module, and what all its calls are made with: addresses, strides, dtypes, threads.

With every address goes the number of bytes that are there. The module compares them with what it will touch
and raises ValueError where they are too few, so that an error of ours is an exception, not a crash.
"""

import ctypes
import importlib
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from factorizer_kernels.shared.dynamo import constant_while_compiling

MODULE = "factorizer_kernels._native"
ON_REQUEST = "FACTORIZER_KERNELS_NATIVE=0"  # setup.py's words for a module that was not wanted


def _left_out() -> str | None:
    """Why setup.py left the module out of this installation; None where it did not, or left no word."""
    file = Path(__file__).parents[1] / "_left_out.txt"
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def _why_missing(error: ImportError) -> str:
    if not (isinstance(error, ModuleNotFoundError) and error.name == MODULE):
        return f"the compiled module cannot be loaded: {error}"
    if (reason := _left_out()) is not None:
        return (
            f"the package was built without its compiled module ({reason}): install a C++17 compiler, then "
            "`pip cache remove factorizer_kernels`, as pip keeps what it builds, and "
            "`pip install --force-reinstall --no-deps` it again"
        )
    root = Path(__file__).parents[2]
    if (root / "CMakeLists.txt").exists():
        return (
            f"{root} is a source folder without a compiled module: start Python in another folder to use an "
            f"installed package, or compile the module here with `pip install -e {root}`"
        )
    return "the package was installed without its compiled module: reinstall it with a C++17 compiler"


def _load() -> Any:
    module = importlib.import_module(MODULE)
    if module.isa() is not None:
        return module
    asked = os.environ.get("FACTORIZER_KERNELS_ISA")
    raise ImportError(
        f"it was compiled for {module.compiled_isas().rstrip(',').replace(',', ', ')}, and "
        + (f"FACTORIZER_KERNELS_ISA is {asked!r}" if asked else "this processor has none of them")
        + ": reinstall it here, or with FACTORIZER_KERNELS_ISAS=all where machines of several kinds share it"
    )


native: Any = None
missing: str | None = None  # why there is no module
try:
    native = _load()
except ImportError as _error:
    missing = _why_missing(_error)
    if os.environ.get("FACTORIZER_KERNELS_NATIVE", "").strip() == "1":
        # What it asks of a build pip does not ask of a build that it has kept.
        raise ImportError(f"FACTORIZER_KERNELS_NATIVE=1, but {missing}") from _error


@constant_while_compiling
def warn_once() -> None:
    """Say once a process that plain PyTorch takes the place of a module that nobody meant to leave out."""
    _warn()


@cache
def _warn() -> None:
    if _left_out() != ON_REQUEST:
        warnings.warn(
            f"factorizer_kernels runs on plain PyTorch, many times slower on a CPU: {missing}",
            RuntimeWarning,
            stacklevel=3,
        )


def _share_torch_threads() -> None:
    # Torch's own OpenMP team does the work, so that two teams never compete for the cores. The symbol is
    # looked up through torch's library and so is that of the runtime it is linked to, whatever its name.
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        launcher = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return  # another threading runtime: the module starts threads of its own
    native.set_team_launcher(ctypes.cast(launcher, ctypes.c_void_p).value)


DTYPE_CODES: dict[torch.dtype, int] = {}  # what stands for each in the module's calls
if native is not None:
    _share_torch_threads()
    DTYPE_CODES = {getattr(torch, name): code for name, code in native.DTYPES.items()}


def memory(x: Tensor) -> tuple[int, int]:
    """The address of x's first element, and the bytes from there to the end of x, or of its storage."""
    if x.is_contiguous():  # to ask for the storage takes longer
        return x.data_ptr(), x.nbytes
    return x.data_ptr(), int(x.untyped_storage().nbytes() - x.storage_offset() * x.element_size())


def volume(x: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """The memory of a (B, C, S1..Sp) tensor, and its strides."""
    return *memory(x), x.stride()


threads = torch.get_num_threads
