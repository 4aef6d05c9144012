"""Nonnegative matrix factorisation.

Read arguments, spec, reference, then a backend (native with cpu and cuda, or triton), autograd, functional.
"""
