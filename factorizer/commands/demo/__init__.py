"""Train a small Swin Factorizer on a folder of volumes, segment held-out ones, and report."""

from .run import run_demo
from .synthetic import write_synthetic

__all__ = ["run_demo", "write_synthetic"]
