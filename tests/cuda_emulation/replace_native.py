"""A pytest plugin: the emulated module takes the place of the installed one.

It must come before ``factorizer_kernels`` is imported, and so before any conftest: ``pytest -p
cuda_emulation.replace_native``, with the module that build.py made in FACTORIZER_KERNELS_EMULATED.
"""

import importlib.util
import os
import sys

assert "factorizer_kernels" not in sys.modules
_spec = importlib.util.spec_from_file_location(
    "factorizer_kernels._native", os.environ["FACTORIZER_KERNELS_EMULATED"]
)
_native = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_native)
sys.modules["factorizer_kernels._native"] = _native
