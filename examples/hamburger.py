"""The context layer of a Hamburger head (HamNet, SegNeXt), on the kernels and as it is usually written.

"Is attention better than matrix decomposition?" (Geng et al., ICLR 2021) puts a nonnegative factorisation in
the place of attention: x (B, C, H, W) is taken as matrices X (C, HW), each near bases U (C, R) times
coefficients V (HW, R). The coefficients begin as a softmax of Xᵀ U; then multiplicative updates of the
coefficients and of the bases follow one another, and one of the coefficients ends them:

    V, U, V, U, ..., V, U, V

`fk.nmf_factors` updates U and then V. So the first update of V is done here, with the product Xᵀ U that the
softmax has made already, and all the others are one call. Run it for both ways' times and memory.
"""

import time

import torch
from torch import Tensor, nn

import factorizer_kernels as fk

EPS = 1e-6


def update(factor: Tensor, projection: Tensor, other: Tensor) -> Tensor:
    """A multiplicative update: projection is X, or its transpose, times the other factor."""
    return factor * projection / (factor @ (other.mT @ other) + EPS)


def context(x: Tensor, bases: Tensor, num_iters: int) -> Tensor:
    """x (B, C, N) and bases (B or 1, C, R), both nonnegative -> (B, C, N), by the kernels."""
    projection = x.mT @ bases
    v = update(projection.softmax(-1), projection, bases)
    u, v = fk.nmf_factors(x, bases, v, num_iters=num_iters, solver="mu", eps=EPS)
    return u @ v.mT


def plain_context(x: Tensor, bases: Tensor, num_iters: int) -> Tensor:
    """The same as the papers' programs have it."""
    u, v = bases, (x.mT @ bases).softmax(-1)
    for _ in range(num_iters):
        v = update(v, x.mT @ u, u)
        u = update(u, x @ v, v)
    v = update(v, x.mT @ u, u)
    return u @ v.mT


class Hamburger(nn.Module):
    """x + W2 context(relu(W1 x)): the two linear maps are the bread. x (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, rank: int = 64, num_iters: int = 6):
        super().__init__()
        self.lower = nn.Conv2d(channels, channels, 1)
        self.upper = nn.Conv2d(channels, channels, 1, bias=False)
        self.num_iters = num_iters
        bases = torch.rand(1, channels, rank)
        self.register_buffer("bases", nn.functional.normalize(bases, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        z = torch.relu(self.lower(x)).flatten(2)
        z = context(z, self.bases, self.num_iters)
        return torch.relu(x + self.upper(z.unflatten(2, x.shape[2:])))


def kept_bytes(function, x: Tensor, *args) -> int:
    """What autograd keeps for the backward, beside the arguments."""
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(x, *args)
    for tensor in (x, *args):
        if isinstance(tensor, Tensor):
            kept.pop(tensor.untyped_storage().data_ptr(), None)
    del y
    return sum(kept.values())


def main(channels: int = 512, size: int = 64, rank: int = 64, num_iters: int = 6, rounds: int = 5) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, channels, size * size, generator=generator, requires_grad=True)
    bases = nn.functional.normalize(torch.rand(1, channels, rank, generator=generator), dim=1)
    dy = torch.randn(x.shape, generator=generator)
    seconds: dict[str, list[float]] = {"kernels": [], "plain": []}
    results = {}
    for _ in range(rounds):  # in turn, so that whatever else the machine does slows both
        for name, function in (("kernels", context), ("plain", plain_context)):
            start = time.perf_counter()
            y = function(x, bases, num_iters)
            (dx,) = torch.autograd.grad(y, x, dy)
            seconds[name].append(time.perf_counter() - start)
            results[name] = y.detach(), dx
    for what, ours, plain in zip(("y", "dx"), results["kernels"], results["plain"], strict=True):
        print(f"{what}: they differ by {(ours - plain).norm() / plain.norm():.0e} of its norm")
    for name, function in (("kernels", context), ("plain", plain_context)):
        kept = kept_bytes(function, x, bases, num_iters)
        best = sorted(seconds[name])[rounds // 2]
        print(
            f"{name:8} {1e3 * best:7.1f} ms forward and backward, {kept / 2**20:6.1f} MiB kept between them"
        )


if __name__ == "__main__":
    main()
