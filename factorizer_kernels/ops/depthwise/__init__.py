"""Depthwise convolution: each channel of a feature map has a small filter of its own.

Read spec, reference, the backends (cpu, triton), autograd, functional.
"""
