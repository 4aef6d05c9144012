"""Shifted-window matricisation.

Read geometry, spec, reference, then a backend (cpu, or address and triton), autograd, functional.
"""
