"""Windows that overlap, plane by plane: the same as MONAI's sliding window."""

import pytest
import torch
from monai.inferers import SlidingWindowInferer

from factorizer.segmentation.sliding import Planes, mirrored, slide

WINDOW = (8, 6, 7)


def network(x):
    return torch.cat([2 * x.sum(1, keepdim=True), x[:, :1] + x.mean((2, 3, 4), keepdim=True), x[:, 1:]], 1)


@pytest.mark.parametrize("size", [(17, 6, 9), (8, 6, 7), (3, 20, 5), (9, 13, 30)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_is_monais_sliding_window(size, batch_size):
    image = torch.randn(2, *size)
    expected = SlidingWindowInferer(WINDOW, overlap=0.5, mode="gaussian")(image[None], network)[0]
    for axis in range(3):
        chunks = list(slide(network, image, WINDOW, axis=axis, batch_size=batch_size))
        assert max(chunk.shape[axis + 1] for chunk in chunks) <= WINDOW[axis]
        torch.testing.assert_close(torch.cat(chunks, axis + 1), expected, rtol=1e-5, atol=1e-5)


def test_planes_are_computed_as_they_are_asked_for():
    values, made = torch.randn(3, 5, 17, 4), []

    def chunks():
        for begin in range(0, 17, 4):
            made.append(begin)
            yield values[:, :, begin : begin + 4]

    planes = Planes(chunks(), 1)
    for begin, end, number in ((0, 1, 1), (0, 6, 2), (5, 7, 2), (6, 6, 2), (15, 17, 5)):
        assert torch.equal(planes.take(begin, end), values[:, :, begin:end])
        assert len(made) == number


def test_mirror_images_are_averaged():
    x, seen = torch.randn(1, 2, 4, 3, 5), []

    def watched(x):
        seen.append(x)
        return x + 1

    torch.testing.assert_close(mirrored(watched, (0, 2))(x), x + 1)
    for image, flip in zip(seen, [[], [2], [4], [2, 4]], strict=True):
        assert torch.equal(image, x.flip(flip))
