"""The races that the project's bounds in numbers.py are read off: wrong results fail, slow ones do not."""

from . import convolutions
from .harness import DEVICE, FUSED, Contender, cases
from .numbers import DEPTHWISE, FAMILY, MANY_CHANNELS, ONE_MATRIX, TWO_SIZES, VOLUME
from .operators import COPY, OURS, REFERENCE, RELU, Matrices, Windows

# Sides of the volume, which is 64x64x64 on a CPU and 128x128x128 on a GPU, of the two sizes, and of the map
# that is convolved.
_SIDES = {"tiny": (16, 16, 8, 8), "default": (64 if DEVICE.type == "cpu" else 128, 128, 32, 48)}


def _ours(name: str, **options) -> Contender:
    return Contender(name, OURS.build, FUSED, modes=("forward",), options=options)


def cases_of(size):
    side, large, small, convolved = ((1, 32, n, n, n) for n in _SIDES.get(size, _SIDES["default"]))
    volume = (OURS, RELU, COPY, REFERENCE, _ours("ours, 20 iterations", num_iters=20))
    return [
        *cases(FAMILY, [(VOLUME, Windows(side))], volume),
        *cases(FAMILY, [(TWO_SIZES, Windows(large))], (OURS, _ours("ours, small", size=small)), ("forward",)),
        *cases(FAMILY, [(MANY_CHANNELS, Windows((1, 512, 8, 8, 8)))], (OURS, REFERENCE)),
        *cases(FAMILY, [(ONE_MATRIX, Matrices((1, 8, 64)))], (OURS, REFERENCE)),
        *cases(
            FAMILY,
            [(DEPTHWISE, convolutions.Depthwise(convolved))],
            (convolutions.DEPTHWISE, convolutions.TORCH, convolutions.NATIVE, COPY),
        ),
    ]


def test_numbers(replay):
    replay()
