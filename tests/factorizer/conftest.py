"""What the tests of `factorizer` share."""

import pytest
import torch

from factorizer.layers.factorization import Solver


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors here are small: threads would only wait for one another. Other folders keep theirs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class PublishedMU(Solver):
    """MU with eps above the fraction line too, as the published code and its golden cases have it.

    Where ReLU has left a column of zeros it gives another result than the MU of this package, which
    keeps zeros at zero; the one golden network with MU has 88 such columns among 4096.
    """

    def update(self, x, u, v, w):
        return (u * (x @ v) + self.eps) / (u @ (v.mT @ v) + self.eps)


@pytest.fixture
def published_mu():
    return PublishedMU
