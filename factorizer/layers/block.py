"""The Factorizer block, and a stage of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

import factorizer_kernels as fk
from factorizer_kernels.shared.checks import integer, integers

from .checks import check_dtype, check_features, check_probability
from .depthwise import DepthwiseConv
from .linear import Linear
from .mixer import FactMixer
from .mlp import MLP
from .norm import LayerNorm
from .parts import Part, build, untouched
from .positional import PositionalEmbedding
from .slabs import filter_in_place, plane_bytes, slabs


class FactorizerBlock(nn.Module):
    """x + FactMixer(norm(x)), then x + MLP(norm(x)), for x (B, channels, S1..Sp).

    With `local`, x + w * x comes first, where w is a depthwise filter. It is not in the Factorizer paper:
    Chu et al. (Conditional Positional Encodings for Vision Transformers, 2021) put one before the blocks
    of a transformer.

    Args:
        channels: number of channels.
        spatial_size: S1..Sp, see `FactMixer`.
        norm: part, called with the number of channels.
        dropout: probability of the dropouts in the mixer and in the MLP.
        mlp_ratio: hidden width of the MLP over the number of channels.
        local: side of the depthwise filter in voxels, odd; None for none.
        kwargs: arguments of `FactMixer`, and through it of the factorisation.
    """

    def __init__(
        self,
        channels: int,
        spatial_size: Sequence[int],
        norm: Part = LayerNorm,
        dropout: float = 0.0,
        mlp_ratio: float = 2,
        local: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.local = None if local is None else DepthwiseConv(channels, local, spatial_dims=len(spatial_size))
        self.norm1 = build("norm", norm, channels)
        self.fact = FactMixer(channels, channels, spatial_size, dropout=dropout, **kwargs)
        self.norm2 = build("norm", norm, channels)
        self.mlp = MLP(channels, ratio=mlp_ratio, dropout=dropout)

    @property
    def fused(self) -> bool:
        """Whether norms, linear maps and sums run as chains of `factorizer_kernels`, with the same result.

        They do where the chains know every part, nothing hangs on one, and no dropout is active.
        """
        fact, linears = self.fact, self.mlp.linears if isinstance(self.mlp, MLP) else None
        if not untouched(fact, FactMixer) or linears is None:
            return False
        norms, projections = (self.norm1, self.norm2), (fact.in_proj, fact.out_proj)
        dropouts = [fact.dropout, *(part for part in self.mlp.block if isinstance(part, nn.Dropout))]
        return (
            all(untouched(n, LayerNorm) and untouched(n.norm, nn.LayerNorm) for n in norms)
            and all(untouched(p, Linear) for p in projections)
            and all(untouched(p.linear, nn.Conv1d) for p in (*projections, *linears))
            and all(untouched(d, nn.Dropout) and not (d.training and d.p) for d in dropouts)
        )

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """x (B, channels, S1..Sp) to the same shape.

        `overwrite`: nobody reads x afterwards, so that its memory may be used.
        """
        if overwrite and x.is_contiguous() and self._takes_slabs(x):
            return self._in_slabs(x)
        spare = None
        if self.local is not None:
            spare = x if overwrite else None
            x = self.local.residual(x)
        if not self.fused:
            x = x + self.fact(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        fact, norm1, norm2 = self.fact, self.norm1, self.norm2
        check_features("FactorizerBlock", x, norm1.dim, len(fact.spatial_size))
        check_dtype(x, fact.out_proj.linear.weight)
        scale, shift = norm1.affine(x)
        y, x = fact.mix_normed(x, scale, shift, norm1.norm.eps, spare)
        own = y if fact.fused else None  # parts from elsewhere may keep what they return
        return fk.linear_norm_mlp(y, x, *self._weights(x), eps=norm2.norm.eps, overwrite=own)

    def _weights(self, x: Tensor) -> list[Any]:
        """Those of `linear_norm_mlp`."""
        linears = self.mlp.linears
        assert linears is not None  # the block is fused
        first, second = (part.weights for part in linears)
        return [*self.fact.out_proj.weights, *self.norm2.affine(x), *first, *second]

    def _takes_slabs(self, x: Tensor) -> bool:
        filters = self.local is None or (isinstance(self.local, DepthwiseConv) and self.local.untouched)
        return self.fused and filters and self.fact.takes_slabs(x)

    def _in_slabs(self, x: Tensor) -> Tensor:
        """`forward` in x's own memory."""
        fact, norm1, norm2 = self.fact, self.norm1, self.norm2
        check_features("FactorizerBlock", x, norm1.dim, len(fact.spatial_size))
        check_dtype(x, fact.out_proj.linear.weight)
        if self.local is not None:
            filter_in_place(x, self.local.residual, self.local.conv.kernel_size[0] // 2)
        weights, size = self._weights(x), plane_bytes(x)
        scale, shift = norm1.affine(x)
        for begin, end, y in fact.mix_slabs(x, scale, shift, norm1.norm.eps):
            for first, last in slabs(begin, end, size):
                part, of_part = x[:, :, first:last], y[:, :, first - begin : last - begin]
                part.copy_(fk.linear_norm_mlp(of_part, part, *weights, eps=norm2.norm.eps))
        return x


class FactorizerStage(nn.Module):
    """Channel adapter, positional embedding, and `depth` Factorizer blocks, on x (B, C, S1..Sp).

    Args:
        in_channels, out_channels: channels of the input and the output.
        spatial_size: S1..Sp, the size that embedding and factors are made for.
        depth: number of blocks.
        adapter: part, called with (in_channels, out_channels); only where these differ.
        pos_embed: part, called with (out_channels, spatial_size).
        dropout: probability of the dropouts in the blocks, and of one after an embedding.
        kwargs: arguments of `FactorizerBlock`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        spatial_size: Sequence[int],
        depth: int = 1,
        adapter: Part = (Linear, {"bias": False}),
        pos_embed: Part = nn.Identity,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        integer("depth", depth, 1)
        size = integers("spatial_size", spatial_size, 1, (1, 2, 3))
        self.adapter: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.adapter = build("adapter", adapter, in_channels, out_channels)
        self.pos_embed = build("pos_embed", pos_embed, out_channels, size)
        embedded = not isinstance(self.pos_embed, nn.Identity)
        check_probability("dropout", dropout)
        self.dropout = nn.Dropout(dropout) if embedded else nn.Identity()
        self.blocks = nn.ModuleList(
            FactorizerBlock(out_channels, size, dropout=dropout, **kwargs) for _ in range(depth)
        )

    def forward(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """x (B, in_channels, S1..Sp) to (B, out_channels, S1..Sp).

        `overwrite`: nobody reads x or the blocks' results afterwards, see `FactorizerBlock`.
        """
        return self.after_adapter(self.adapter(x), overwrite)

    @property
    def keeps_nothing(self) -> bool:
        """Whether no part of it can keep a map that it returns: all are known."""
        return (
            untouched(self, FactorizerStage)
            and untouched(self.adapter, nn.Identity, Linear)
            and untouched(self.pos_embed, nn.Identity, PositionalEmbedding)
            and untouched(self.dropout, nn.Identity, nn.Dropout)
        )

    def after_adapter(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """What follows the channel adapter, on x (B, out_channels, S1..Sp)."""
        x = self.dropout(self.pos_embed(x))
        for block in self.blocks:
            x = block(x, overwrite) if overwrite and type(block) is FactorizerBlock else block(x)
        return x
