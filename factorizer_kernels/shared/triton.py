"""Triton: whether its kernels can run here. Only then is it imported: it takes 0.2 s and 0.08 GB."""

import os

import torch

# Triton reads the variable when a kernel is decorated, so this is final once this module is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _why_missing() -> str | None:
    if not (torch.backends.cuda.is_built() or INTERPRETED):
        return f"PyTorch {torch.__version__} is built without CUDA"
    try:
        import triton
        import triton.language
    except ImportError as error:
        return f"Triton is missing ({error}): pip install triton"
    # Earlier ones fail in every kernel here: they know no tuples of blocks.
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 4):
        old = f"Triton {triton.__version__} is too old"
        return f"{old}: pip install 'triton>=3.4', which torch 2.8 and later bring"
    return None


missing = _why_missing()
