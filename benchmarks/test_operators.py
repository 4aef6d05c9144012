"""The operators, beside the floor, the reference, attention, other people's NMF, torch's convolution."""

import torch

from .convolutions import DEPTHWISE, NATIVE, TORCH, Depthwise
from .harness import cases, extent
from .operators import (
    ATTENTION,
    COMPILED,
    COPY,
    LINEAR_ATTENTION,
    OURS,
    REFERENCE,
    RELU,
    SHIFTED_ATTENTION,
    SKLEARN,
    TORCHNMF,
    WINDOW_ATTENTION,
    Matrices,
    Windows,
)

_ATTENTIONS = (ATTENTION, WINDOW_ATTENTION, SHIFTED_ATTENTION, LINEAR_ATTENTION)
_ALL = (OURS, RELU, COPY, REFERENCE, *_ATTENTIONS)

# Voxels along an axis of the maps for each --size: the volumes that speed is plotted over, the one that
# torch.compile joins in on, the images, the volume whose other options are varied; N of the matrices;
# channels of the maps that are convolved, as a MedNeXt's, and their voxels along an axis.
_SIZES = {
    "tiny": ((8, 16), 8, (16,), 8, 64, ((4, 8),)),
    "default": ((16, 32, 64, 128), 64, (256, 512), 32, 4096, ((32, 64), (64, 32), (128, 16), (256, 8))),
    "paper": (
        (16, 32, 64, 128, 192),
        128,
        (256, 512, 1024),
        64,
        65536,
        ((32, 128), (64, 64), (128, 32), (256, 16)),
    ),
}


def _volume(side: int, **options) -> Windows:
    return Windows((1, 32, side, side, side), **options)


def _modes(size: str, largest: bool) -> tuple[str, ...]:
    """The default run leaves out the gradients of the largest maps: float64's truth alone takes a minute."""
    return ("forward",) if size == "default" and largest else ("forward", "forward+backward")


def cases_of(size):
    sides, compiled, images, swept, columns, convolved = _SIZES[size]
    for side in sides:
        extra = (COMPILED,) if side == compiled else ()
        modes = _modes(size, side == sides[-1])
        yield from cases("swin_nmf volume", [(extent(side), _volume(side))], (*_ALL, *extra), modes)
    for side in images:
        yield from cases(
            "swin_nmf image",
            [(extent(side, 2), Windows((1, 32, side, side), head_dim=8, patch_size=8))],
            (OURS, RELU, COPY, REFERENCE, WINDOW_ATTENTION, SHIFTED_ATTENTION, LINEAR_ATTENTION),
            _modes(size, side == images[-1]),
        )
    few = (OURS, RELU, REFERENCE)
    yield from cases(
        f"swin_nmf {extent(swept)}",
        [
            *((f"{solver}, rank {rank}", _volume(swept, rank=rank, solver=solver))
              for solver, rank in (("mu", 1), ("mu", 2), ("mu", 4), ("mu", 8), ("hals", 2), ("hals", 4))),
            *((f"rank {rank}, {t} iterations", _volume(swept, rank=rank, num_iters=t, solver="mu"))
              for rank, t in ((1, 1), (1, 20), (4, 1), (4, 20))),
            ("shifts 0 2 4 6", _volume(swept, shifts=(None, 2, 4, 6))),
            ("bfloat16", _volume(swept, dtype=torch.bfloat16)),
        ],
        few,
    )  # fmt: skip
    yield from cases(
        "nmf",
        [
            (f"64 x {columns}, rank 8, {solver}, 20 iterations", Matrices((1, 64, columns), 8, 20, solver))
            for solver in ("mu", "hals")
        ]
        + [("64 of 8 x 512, rank 1", Matrices((64, 8, 512)))],
        (OURS, RELU, COPY, REFERENCE, SKLEARN, TORCHNMF),
    )
    yield from cases(
        "nmf",
        [(f"4 of 8 x {columns * 64}, rank 1 (global)", Matrices((4, 8, columns * 64)))],
        few,
    )
    for kernel_size in (3, 5):
        yield from cases(
            f"depthwise {extent(kernel_size)}",
            [
                (f"{channels} of {extent(n)}", Depthwise((1, channels, n, n, n), kernel_size))
                for channels, n in convolved
            ],
            (DEPTHWISE, TORCH, NATIVE, COPY),
        )


def test_operators(replay):
    replay()
