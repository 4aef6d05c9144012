"""Nonnegative matrix factorisation. Read reference, cpu, autograd, functional."""
