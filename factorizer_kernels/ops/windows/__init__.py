"""Shifted-window matricisation. Read geometry, reference, cpu, autograd, functional."""
