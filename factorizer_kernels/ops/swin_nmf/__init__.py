"""Shifted-window NMF, fused.

Read spec, reference, then a backend (cpu, cuda or triton), autograd, functional.
"""
