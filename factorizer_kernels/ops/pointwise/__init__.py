"""Pointwise chains: norms, linear maps and MLPs that treat every voxel alike, and the linear maps between a
grid and one that is coarser by whole numbers.

Read spec, reference, the backends (cpu, triton, torch), autograd, functional.
"""
