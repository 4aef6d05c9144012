"""What the tests of `factorizer` share."""

import pytest
import torch

from factorizer.layers.factorization.solvers import PublishedMultiplicativeUpdate


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory):
    """A Decathlon folder of five small made-up cases, to be read only."""
    from factorizer.commands.demo import write_synthetic

    return write_synthetic(tmp_path_factory.mktemp("synthetic"), cases=5, shape=(18, 18, 18))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors here are small: threads would only wait for one another. Other folders keep theirs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def published_mu():
    """MU with eps above the fraction line too, as the golden cases have it.

    The one golden network with MU has 88 columns of zeros among 4096.
    """
    return PublishedMultiplicativeUpdate
