"""The Factorizer's context layer: every window replaced by its low-rank factorisation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

import factorizer_kernels as fk
from factorizer_kernels.shared.checks import integer, integers

from .checks import check_features, check_probability
from .factorization import NMF, MatrixFactorization
from .factorization.inits import FixedInit
from .linear import Linear
from .matricize import Matricize, SWMatricize
from .parts import Part, build, untouched
from .resize import crop_to, pad_to, resample
from .slabs import plane_bytes, slabs, worth_slabs

PATCHES = 4  # windows of a slab along its first axis, at least: one more is computed twice
SLAB_BYTES = 2**26  # and its bytes, about, where that is more


class FactMixer(nn.Module):
    """Linear, matricise, activation, factorise, put together again, linear, dropout.

    (Factorizer paper, Medical Image Analysis 84, 2023.) Where the parts allow it, the
    middle four run as one operator, `factorizer_kernels.swin_nmf`; see `fused`.

    x (B, in_channels, S1..Sp) becomes (B, out_channels, S1..Sp). Any spatial size may be passed.
    Windows that do not divide it are completed with zeros, which the factorisation ignores, and
    cropped again; the cyclic shifts run over the completed size. Where windows grow with x
    (`grid_size`), the start of V is interpolated.

    Args:
        in_channels, out_channels: channels of the input and the output.
        spatial_size: S1..Sp, the size that the factors are made for.
        reshape: part, called with (None, out_channels, S1..Sp); has `output_size`, `forward` and
            `inverse_forward`.
        act: part, called with no argument; None for none.
        factorize: part, called with the matrices' size (M, N) and kwargs.
        dropout: probability of the dropout at the end.
        kwargs: arguments of `factorize`.

    Raises:
        TypeError, ValueError: the message names the argument, what it got and what it needs.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        spatial_size: Sequence[int],
        reshape: Part = (Matricize, {"num_heads": 1, "grid_size": 1}),
        act: Part | None = nn.ReLU,
        factorize: Part = NMF,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.in_channels = integer("in_channels", in_channels, 1)
        integer("out_channels", out_channels, 1)
        self.spatial_size = integers("spatial_size", spatial_size, 1, (1, 2, 3))
        self.in_proj = Linear(in_channels, out_channels, bias=False)
        self.reshape = build("reshape", reshape, (None, out_channels, *self.spatial_size))
        self.act = nn.Identity() if act is None else build("act", act)
        size = tuple(self.reshape.output_size[-2:])
        self.factorize = build("factorize", factorize, size, **kwargs)
        self.out_proj = Linear(out_channels, out_channels)
        self.dropout = nn.Dropout(check_probability("dropout", dropout))

    @property
    def fused(self) -> bool:
        """Whether the present parts run as one operator: the one place where this is decided.

        They do where the operator knows them all and nothing hangs on one: a part with a hook runs on its
        own, so that the hook is called.
        """
        return (
            untouched(self.reshape, Matricize, SWMatricize)
            and "inverse_forward" not in vars(self.reshape)
            and untouched(self.act, nn.ReLU, nn.Identity)
            and untouched(self.factorize, NMF, MatrixFactorization)
            and untouched(self.factorize.init, FixedInit)
            and self.factorize.kernel_options is not None
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in_channels, S1..Sp) to (B, out_channels, S1..Sp)."""
        check_features("FactMixer", x, self.in_channels, len(self.spatial_size))
        return self.dropout(self.out_proj(self.mix(self.in_proj(x))))

    def mix(self, x: Tensor) -> Tensor:
        """What happens between the two linear maps, on x (B, out_channels, S1..Sp)."""
        return self._fused(x) if self.fused else self._unfused(x)

    def mix_normed(
        self,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        overwrite: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Layer normalisation, the first linear map and `mix`, on x (B, in_channels, S1..Sp); and x.

        See `factorizer_kernels.norm_linear_swin_nmf`: it takes x without padding only.
        """
        weights = norm_weight, norm_bias, *self.in_proj.weights
        size = tuple(x.shape[2:])
        if self.fused and tuple(self.reshape.fitted_size(size)) == size:
            factors, options = self._operator(x)
            return fk.norm_linear_swin_nmf(
                x, *weights, *factors, norm_eps=eps, overwrite=overwrite, **options
            )
        y, x = fk.norm_linear(x, *weights, eps=eps, residual=True)
        return self.mix(y), x

    def takes_slabs(self, x: Tensor) -> bool:
        """Whether `mix_slabs` takes a map, and it is worth it: there are several slabs in it.

        One that windows do not divide would exist three times: as it is, completed, and cut out again.
        """
        if not self.fused or self.reshape.window_options["patch_size"] is None:
            return False
        size = tuple(x.shape[2:])
        copies = 1 if tuple(self.reshape.fitted_size(size)) == size else 3
        return worth_slabs(copies * x.nbytes, x) and size[0] > PATCHES * self.reshape.window_size(size)[0]

    def mix_slabs(
        self, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
    ) -> Iterator[tuple[int, int, Tensor]]:
        """What `mix_normed` makes of x (B, in_channels, S1..Sp), of some planes of the first axis at a time.

        Yields the first plane, the one after the last, and the values there. x may be overwritten there, and
        no further, before the next ones are asked for.
        """
        weights = norm_weight, norm_bias, *self.in_proj.weights
        factors, options = self._operator(x)
        length, *across = self.reshape.fitted_size(x.shape[2:])
        patch = self.reshape.window_size(x.shape[2:])[0]
        shifts = [
            list(shift) if isinstance(shift, Sequence) else [shift or 0] * (x.dim() - 2)
            for shift in options["shifts"]
        ]
        # The windows of a slab reach so many planes before it and behind it: whole windows, all together.
        before = max(shift[0] % patch for shift in shifts)
        behind = max(-shift[0] % patch for shift in shifts)
        behind += -(before + behind) % patch
        around = before + behind
        options["shifts"] = [[shift[0] - before, *shift[1:]] for shift in shifts]

        def normed(begin: int, end: int, out: Tensor) -> None:
            if out.shape[3:] != x.shape[3:] or end > x.shape[2]:
                out.zero_()  # what completes the windows
            inside = crop_to(out, (out.shape[2], *x.shape[3:]))
            for first, last in slabs(begin, min(end, x.shape[2]), plane_bytes(x)):
                values: Any = fk.norm_linear(x[:, :, first:last], *weights, eps=eps)
                inside[:, :, first - begin : last - begin] = values

        count = -(-length // max(PATCHES * patch, SLAB_BYTES // plane_bytes(x)))
        ends = [length // patch * (k + 1) // count * patch for k in range(count)]
        thickest = -(-length // patch // count) * patch + around
        # Of the planes around the ends, which windows join; then of those around a slab's end, for the next.
        ring = x.new_empty(x.shape[0], self.reshape.channels, around, *across)
        normed(length - before, length, ring[:, :, :before])
        normed(0, behind, ring[:, :, before:])
        kept, first_ones = ring, ring[:, :, before:]
        memory = x.new_empty(x.shape[0] * ring.shape[1] * thickest * math.prod(across))
        for begin, end in zip([0, *ends], ends, strict=False):
            shape = x.shape[0], ring.shape[1], end - begin + around, *across
            y = memory[: math.prod(shape)].view(shape)
            y[:, :, :around] = kept
            if end < length:
                normed(begin + behind, end + behind, y[:, :, around:])
            else:
                normed(begin + behind, end, y[:, :, around : shape[2] - behind])
                y[:, :, shape[2] - behind :] = first_ones
            kept = y[:, :, shape[2] - around :].clone()
            y = fk.swin_nmf(y, *factors, **options, overwrite=y)
            end = min(end, x.shape[2])
            yield begin, end, crop_to(y.narrow(2, before, end - begin), (end - begin, *x.shape[3:]))

    def decompose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of the matrices of x (B, in_channels, S1..Sp), to be looked at.

        Returns:
            U (shifts * B * heads, windows, head_dim, R) and V (shifts * B * heads, windows, voxels
            of a window, R).
        """
        x = self.in_proj(x)
        return self.factorize.decompose(self.act(self.reshape(x)), **self._start(x))

    def _fused(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        factors, options = self._operator(x)
        padded = pad_to(x, self.reshape.fitted_size(size))
        y = fk.swin_nmf(padded, *factors, **options, overwrite=None if padded is x else padded)
        return crop_to(y, size)

    def _operator(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        """u0 and v0, and the options of `factorizer_kernels.swin_nmf`, for x or what it is padded to."""
        init = self.factorize.init
        factors = self._start(x).get("start") or (init.u0, init.v0)
        act = "relu" if isinstance(self.act, nn.ReLU) else None
        windows = self.reshape.options(self.reshape.fitted_size(x.shape[2:]))
        return factors, {"act": act, **windows, **self.factorize.kernel_options}

    def _unfused(self, x: Tensor) -> Tensor:
        # Parts from elsewhere need not know of other sizes than the one they were made for.
        resized = () if tuple(x.shape[2:]) == self.spatial_size else (x.shape[2:],)
        z = self.factorize(self.act(self.reshape(x)), **self._start(x))
        return self.reshape.inverse_forward(z, *resized)

    def _start(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Where the windows of x are of another size than V was made for: the start to use."""
        init = getattr(self.factorize, "init", None)
        if not isinstance(init, FixedInit) or not isinstance(self.reshape, SWMatricize):
            return {}
        made, now = map(self.reshape.window_size, (self.spatial_size, x.shape[2:]))
        if made == now:
            return {}
        v0 = resample(init.v0.mT.unflatten(-1, made)[None], now)[0]
        return {"start": (init.u0, v0.flatten(1).mT)}
