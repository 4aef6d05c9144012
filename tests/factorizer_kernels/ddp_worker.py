"""One of two processes of a data-parallel step: ``python ddp_worker.py RANK RENDEZVOUS RESULT``."""

import sys

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import factorizer_kernels as fk


class Layer(nn.Module):
    """A channel mixing and its windows' NMF, with factors that are trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv2d(8, 8, 1)
        self.u0, self.v0 = nn.Parameter(torch.rand(4, 2)), nn.Parameter(torch.rand(16, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return fk.swin_nmf(
            self.mix(x), self.u0, self.v0, head_dim=4, patch_size=4, shifts=[None, 2], solver="mu"
        )


def batch(rank: int) -> torch.Tensor:
    return torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(rank))


if __name__ == "__main__":
    rank, rendezvous, result = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    layer = DistributedDataParallel(Layer())
    layer(batch(rank)).square().mean().backward()
    if rank == 0:
        torch.save({name: p.grad for name, p in layer.module.named_parameters()}, result)
    distributed.destroy_process_group()
