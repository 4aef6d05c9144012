"""The Triton kernels. Read address, updates, rank1, resident, streaming, sweep.

``address`` finds a window's voxels in memory. ``updates`` (any rank up to 8) and ``rank1`` (the rank-1
identity) are the arithmetic of one step, forward and backward. ``resident`` runs all the iterations of
one window in one program; ``streaming`` passes over matrices that do not fit on chip; ``sweep`` updates
factors of any rank around torch's matrix products. ``launch`` holds what all the launches share.
"""
