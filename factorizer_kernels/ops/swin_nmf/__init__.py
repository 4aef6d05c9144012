"""Shifted-window NMF, fused. Read reference, cpu, autograd, functional."""
