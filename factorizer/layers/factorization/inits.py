"""Where a factorisation starts: U (M, R) and V (N, R).

`uniform` and `normal` are drawn once, kept as the buffers u0 and v0, and shared by all the
matrices. `svd` and `nndsvd` are computed from the matrices, as constants: they are not
differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

DRAWS: dict[str, Callable[..., Tensor]] = {"uniform": torch.rand, "normal": torch.randn}


class FixedInit(nn.Module):
    """Factors drawn once: U[0, 1) for "uniform", N(0, 1) for "normal".

    Args:
        size: (M, N).
        rank: R.
        names: the draw of U and the draw of V.
    """

    u0: Tensor
    v0: Tensor

    def __init__(self, size: tuple[int, int], rank: int, names: tuple[str, str]) -> None:
        super().__init__()
        self.names = names
        self.register_buffer("u0", torch.empty(size[0], rank))
        self.register_buffer("v0", torch.empty(size[1], rank))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws u0, then v0, anew: for memory that holds nothing yet, as after `to_empty`."""
        for start, name in zip((self.u0, self.v0), self.names, strict=True):
            start.copy_(DRAWS[name](start.shape, dtype=start.dtype, device=start.device))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """u0 (M, R) and v0 (N, R), whatever x (..., M, N) holds."""
        return self.u0, self.v0

    def extra_repr(self) -> str:
        return ", ".join(self.names)


class SVDInit(nn.Module):
    """Truncated singular value decomposition: U sqrt(S) and V sqrt(S), the best factors of rank R.

    (Eckart and Young, Psychometrika 1, 1936.)
    """

    def __init__(self, size: tuple[int, int], rank: int) -> None:
        super().__init__()
        if rank > min(size):
            raise ValueError(
                f"rank must be at most {min(size)} for an init from the SVD of {size[0]} x "
                f"{size[1]} matrices, got {rank}"
            )
        self.rank = rank

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., M, N) to U (..., M, R) and V (..., N, R), float32 at least."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # half precision has no SVD
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        root = s[..., None, : self.rank].sqrt()
        return u[..., : self.rank] * root, vt[..., : self.rank, :].mT * root


class NNDSVDInit(SVDInit):
    """Nonnegative double SVD (Boutsidis and Gallopoulos, Pattern Recognition 41, 2008).

    Of every singular pair, the half (positive or negative parts) with the larger product of norms.
    """

    @torch.no_grad()
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., M, N) to U (..., M, R) and V (..., N, R), float32 at least, nonnegative."""
        u, v = super().forward(x)
        positive, negative = (u.relu(), v.relu()), ((-u).relu(), (-v).relu())
        weight_positive, weight_negative = (
            p.norm(dim=-2, keepdim=True) * q.norm(dim=-2, keepdim=True) for p, q in (positive, negative)
        )
        keep = weight_positive >= weight_negative
        u, v = (torch.where(keep, p, n) for p, n in zip(positive, negative, strict=True))
        # The two halves get the same norm, and the product the weight of the chosen pair.
        norms = u.norm(dim=-2, keepdim=True), v.norm(dim=-2, keepdim=True)
        tiny = torch.finfo(u.dtype).tiny
        balance = (norms[1] / norms[0].clamp_min(tiny)).sqrt()
        return u * balance, v / balance.clamp_min(tiny)


def make_init(init: str | Sequence[str], size: tuple[int, int], rank: int) -> nn.Module:
    """The init named by "uniform", "normal", "svd", "nndsvd", or a pair of the first two (U, V)."""
    if init == "svd":
        return SVDInit(size, rank)
    if init == "nndsvd":
        return NNDSVDInit(size, rank)
    if not isinstance(init, (str, Sequence)):
        raise TypeError(f"init must be a name or a pair of names, got {init!r}")
    names = (init, init) if isinstance(init, str) else tuple(init)
    if len(names) != 2 or not all(name in DRAWS for name in names):
        raise ValueError(
            f"init must be one of 'uniform', 'normal', 'svd', 'nndsvd', or a pair of the first "
            f"two, got {init!r}"
        )
    return FixedInit(size, rank, names)
