"""Large maps that an inference computes slab by slab."""

import pytest
import torch

from factorizer import Factorizer, FactorizerBlock, Matricize, SWMatricize
from factorizer.layers import mixer, slabs
from factorizer.layers.conv import Conv2d, Conv3d

OPTIONS = {"head_dim": 4, "patch_size": 4}
RESHAPES = {
    "swin": (SWMatricize, OPTIONS),
    "many": (SWMatricize, OPTIONS | {"shifts": [None, 1, [2, 0, -3], 3]}),
    "local": (Matricize, OPTIONS),
}


@pytest.fixture
def thin(monkeypatch):
    """Every map is a large one, and a slab is a few planes."""

    def on():
        monkeypatch.setattr(slabs, "LARGE", 1)
        monkeypatch.setattr(slabs, "SLAB_BYTES", 2**12)
        monkeypatch.setattr(mixer, "SLAB_BYTES", 2**12)

    return on


@torch.no_grad()
@pytest.mark.parametrize("local", [None, 1, 3])
@pytest.mark.parametrize("reshape", RESHAPES)
@pytest.mark.parametrize("size", [(40, 8, 12), (43, 9, 6)])
def test_block_in_its_own_memory(thin, reshape, size, local):
    """The same bits, in the memory of x; sizes that windows do not divide are completed."""
    torch.manual_seed(0)
    block = FactorizerBlock(8, size, reshape=RESHAPES[reshape], local=local).eval()
    x = torch.randn(2, 8, *size)
    expected = block(x.clone())
    thin()
    assert torch.equal(block(x.clone()), expected)
    y = block(x, overwrite=True)
    assert torch.equal(y, expected)
    assert y.data_ptr() == x.data_ptr()


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 1, 2, 3])
@pytest.mark.parametrize("conv", [Conv2d, Conv3d])
def test_convolution(thin, conv, padding):
    torch.manual_seed(0)
    module = conv(3, 8, 3, padding=padding)
    x = torch.randn(2, 3, 19, 12, 9)[..., : 9 if conv is Conv3d else 1].squeeze(4 if conv is Conv2d else 0)
    with torch.enable_grad():  # torch's own choice
        expected = module(x).detach()
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-6)
    thin()
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-6)


def test_what_is_differentiated_has_no_slabs(thin):
    torch.manual_seed(0)
    network = Factorizer(
        2, 3, (40, 8, 8), encoder_depth=(1, 1), encoder_width=(8, 8), strides=(1, 2), decoder_depth=(1,),
        reshape=RESHAPES["swin"],
    )  # fmt: skip
    x = torch.randn(1, 2, 40, 8, 8)
    expected = network(x)
    thin()
    y = network(x)
    y.sum().backward()
    assert torch.equal(y, expected)
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected.detach(), rtol=1e-5, atol=1e-5)
